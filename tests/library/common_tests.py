# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Transformers' own common tests, run on classes of our choice.

The source distribution on PyPI has them, but for the modules that they import from its folders: of those, empty mixins
take the place.
"""

import copy
import importlib
import sys
import types
import unittest
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import PreTrainedConfig
from transformers.utils import logging


PACKAGE = "transformers_tests"
MISSING = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def import_common_tests(folder: Path) -> types.ModuleType:
    """`tests/test_modeling_common.py` of an unpacked source distribution, as a module of a package of its own."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder / "tests")]
    sys.modules[PACKAGE] = package
    for path, mixin in MISSING.items():
        parent = path.partition(".")[0]
        sys.modules[f"{PACKAGE}.{parent}"] = types.ModuleType(f"{PACKAGE}.{parent}")
        stand_in = sys.modules[f"{PACKAGE}.{path}"] = types.ModuleType(f"{PACKAGE}.{path}")
        setattr(stand_in, mixin, type(mixin, (), {}))
    # Their marks are not ours, and ours are strict.
    with mock.patch.object(pytest, "mark", pytest.MarkGenerator(_ispytest=True)):
        return importlib.import_module(f"{PACKAGE}.test_modeling_common")


class ModelTester:
    """What the common tests ask about the model under test."""

    batch_size, seq_length, is_training = 3, 7, True

    def __init__(self, config: PreTrainedConfig):
        self._config = config
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            setattr(self, name, getattr(config, name))

    def get_config(self) -> PreTrainedConfig:
        return copy.deepcopy(self._config)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids).tril()}


class _Outcomes(unittest.TestResult):
    """How every test ended: "passed", "skipped", or its traceback."""

    def __init__(self):
        super().__init__()
        self.outcomes: dict[str, str] = {}

    def startTest(self, test):
        super().startTest(test)
        self.outcomes[test._testMethodName] = "passed"

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        name = getattr(test, "test_case", test)._testMethodName  # of a subtest, its test
        self.outcomes[name] = "skipped: " + reason

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.outcomes[test._testMethodName] = self.failures[-1][1]

    def addError(self, test, err):
        super().addError(test, err)
        self.outcomes[test._testMethodName] = self.errors[-1][1]

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is not None:
            self.outcomes[test._testMethodName] = (self.failures + self.errors)[-1][1]


def run_common_tests(
    common: types.ModuleType,
    make_config: Callable[[], PreTrainedConfig],
    classes: tuple[type, ...],
    **attributes: bool,
) -> dict[str, str]:
    """Runs `ModelTesterMixin` of [`import_common_tests`].

    Args:
        make_config: of the model under test.
        classes: the base model, then its heads.
        attributes: of the test case, such as `test_all_params_have_gradient`.

    Returns:
        By a test's name, "passed", "skipped: why", or its traceback.
    """

    def set_up(self):
        self.model_tester = ModelTester(make_config())

    bases = (common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase)
    case = type("CommonTest", bases, {"all_model_classes": classes, "setUp": set_up, **attributes})
    result = _Outcomes()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_warning()  # some tests read the log
    # They tell a base model by its name.
    with mock.patch.dict(common.MODEL_MAPPING_NAMES, {make_config().model_type: classes[0].__name__}):
        unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    logging.set_verbosity(verbosity)
    return result.outcomes
