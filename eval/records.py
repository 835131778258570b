class RunError(ValueError):
    pass
