# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels behind `depth_kernels_attnres`, which documents, checks and launches them.

Letters: M tokens, D hidden size, n sources, R rows (queries read together).

Every kernel works token by token in fp32. A pointer is `None` where the call has no such tensor, and Triton compiles a
kernel for the pointers that are there. Tiles are powers of two wide; columns beyond D are masked.

Zero queries must leave the stream of "sum" as it is. The weights that anchor it are therefore written such that equal
scores make them exactly 0, however a division rounds. Products of 0 and finite values then add nothing.
"""

# Transformers refuses a checkpoint whose code imports what is not installed, unless the import is in a `try`.
try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The kernels of depth attention need Triton: pip install 'modeling-attnres[triton]'") from error


@triton.jit
def _load(pointer, start, columns, mask):
    return tl.load(pointer + start + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, start, columns, values, mask):
    tl.store(pointer + start + columns, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _round(values, pointer):
    """`values` in fp32, rounded to the dtype of what `pointer` points to."""
    return values.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def _merge_shares(logit, num_sources, SUM: tl.constexpr):
    """The shares of phase 1 and of the recent source, from the logit of the latter.

    "mean": the complement of `sigmoid(logit)`, and it. "sum": `1 - c` and `c = t / (n / 2 - (n / 2 - 1) t)` with
    `t = tanh(logit)`. The exponential is of a negative number in both and cannot overflow.
    """
    if SUM:
        exponential = tl.exp(-2.0 * tl.abs(logit))
        tanh = tl.div_rn(1.0 - exponential, 1.0 + exponential)
        tanh = tl.where(logit < 0, -tanh, tanh)
        taken = tl.div_rn(tanh, num_sources * 0.5 - (num_sources * 0.5 - 1.0) * tanh)
        kept = 1.0 - taken
    else:
        exponential = tl.exp(-tl.abs(logit))
        small = tl.div_rn(exponential, 1.0 + exponential)
        large = tl.div_rn(1.0, 1.0 + exponential)
        kept = tl.where(logit < 0, large, small)
        taken = tl.where(logit < 0, small, large)
    return kept, taken


@triton.jit
def _inverse_rms(values, eps, D: tl.constexpr):
    return tl.rsqrt(tl.sum(values * values, 0) / D + eps)


@triton.jit
def _store_normed(normed_ptr, weight_ptr, values, inverse_rms, start, columns, mask):
    """RMSNorm as Llama's: the normed values are rounded before they are multiplied by the weight."""
    normed = _round(values * inverse_rms, normed_ptr) * _load(weight_ptr, 0, columns, mask)
    _store(normed_ptr, start, columns, normed, mask)


@triton.jit(do_not_specialize=["num_tokens", "num_sources"])
def merge_forward(
    row_ptr,
    offset_ptr,
    query_ptr,
    floor_ptr,
    recent_ptr,
    output_ptr,
    stream_ptr,
    weight_ptr,
    mix_ptr,
    logit_ptr,
    new_recent_ptr,
    new_stream_ptr,
    normed_ptr,
    saved_ptr,
    num_tokens,
    num_sources,
    eps,
    SUM: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One token of `merge`; leaves score, norm of the recent source and 1 / rms of the mix in `saved` `[3, M]`."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    mask = columns < D
    start = token * D

    if output_ptr is not None:
        output = _load(output_ptr, start, columns, mask)
    if recent_ptr is None:
        values = output
    else:
        values = _load(recent_ptr, start, columns, mask)
        if output_ptr is not None:
            values = _round(values + output, new_recent_ptr)
            _store(new_recent_ptr, start, columns, values, mask)

    floor = tl.load(floor_ptr)
    norm = tl.sqrt_rn(tl.sum(values * values, 0) + floor * floor)
    score = tl.div_rn(tl.sum(values * _load(query_ptr, 0, columns, mask), 0), norm)
    if SUM:
        logit = tl.load(offset_ptr + token) + 0.5 * score
        base = _load(stream_ptr, start, columns, mask)
        if output_ptr is not None:
            base = _round(base + output, new_stream_ptr)
            _store(new_stream_ptr, start, columns, base, mask)
        if row_ptr is not None:
            base += _load(row_ptr, start, columns, mask)
    else:
        logit = tl.load(offset_ptr + token) + score
        base = _load(row_ptr, start, columns, mask)
    kept, taken = _merge_shares(logit, num_sources, SUM)
    if SUM:
        taken *= num_sources
    mix = _round(kept * base + taken * values, mix_ptr)
    _store(mix_ptr, start, columns, mix, mask)
    tl.store(logit_ptr + token, logit)
    tl.store(saved_ptr + token, score)
    tl.store(saved_ptr + num_tokens + token, norm)
    if normed_ptr is not None:
        inverse_rms = _inverse_rms(mix, eps, D)
        tl.store(saved_ptr + 2 * num_tokens + token, inverse_rms)
        _store_normed(normed_ptr, weight_ptr, mix, inverse_rms, start, columns, mask)


@triton.jit(do_not_specialize=["num_tokens", "num_sources"])
def merge_backward(
    mix_ptr,
    values_ptr,
    query_ptr,
    weight_ptr,
    logit_ptr,
    saved_ptr,
    mix_gradient_ptr,
    normed_gradient_ptr,
    logit_gradient_ptr,
    values_gradient_ptr,
    stream_gradient_ptr,
    to_row_ptr,
    to_offset_ptr,
    to_values_ptr,
    to_stream_ptr,
    to_output_ptr,
    partial_ptr,
    num_tokens,
    num_sources,
    SUM: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The tokens p, p + P, p + 2 P... of `merge`'s backward, in the p-th of P programs for a slice of WIDTH columns.

    `values` is the recent source as it was scored. Gradients of query and norm weight are sums over tokens; each program
    leaves its own in `partial` `[2, P, D]`, so that the total does not depend on the order in which programs finish.
    """
    program = tl.program_id(0).to(tl.int64)
    num_programs = tl.num_programs(0)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = columns < D
    to_query = tl.zeros([WIDTH], tl.float32)
    to_weight = tl.zeros([WIDTH], tl.float32)
    for token in range(program, num_tokens, num_programs):
        start = token * D
        inverse_rms = 1.0
        if normed_gradient_ptr is not None:
            inverse_rms = tl.load(saved_ptr + 2 * num_tokens + token)

        # Inner products over all columns. A larger share of the recent source moves the mix along `away`: the derivative
        # of the mix by the logit score is a scalar times n recent - mix ("sum") or recent - mix, without the row.
        normed_along = tl.zeros([WIDTH], tl.float32)
        normed_away = tl.zeros([WIDTH], tl.float32)
        mix_away = tl.zeros([WIDTH], tl.float32)
        direct_away = tl.zeros([WIDTH], tl.float32)
        for first in range(0, D, WIDTH):
            every = first + tl.arange(0, WIDTH)
            inside = every < D
            mix = _load(mix_ptr, start, every, inside)
            away = num_sources * _load(values_ptr, start, every, inside) - mix
            if normed_gradient_ptr is not None:
                scaled = _load(normed_gradient_ptr, start, every, inside) * _load(weight_ptr, 0, every, inside)
                normed_along += scaled * mix
                normed_away += scaled * away
                mix_away += mix * away
            if mix_gradient_ptr is not None:
                direct_away += _load(mix_gradient_ptr, start, every, inside) * away
        normed_share = 0.0
        gradient_away = 0.0
        if normed_gradient_ptr is not None:
            # Gradient of the mix through its norm: inverse_rms * (scaled - normed_share * mix).
            normed_share = inverse_rms * inverse_rms * (tl.sum(normed_along, 0) / D)
            gradient_away += inverse_rms * (tl.sum(normed_away, 0) - normed_share * tl.sum(mix_away, 0))
        if mix_gradient_ptr is not None:
            gradient_away += tl.sum(direct_away, 0)

        kept, taken = _merge_shares(tl.load(logit_ptr + token), num_sources, SUM)
        if SUM:
            to_logit = gradient_away * tl.div_rn(2.0 * (1.0 + (num_sources - 1) * taken), num_sources * 1.0)
            taken *= num_sources
        else:
            to_logit = gradient_away * taken
        if logit_gradient_ptr is not None:
            to_logit += tl.load(logit_gradient_ptr + token)
        tl.store(to_offset_ptr + token, to_logit)
        to_score = 0.5 * to_logit if SUM else to_logit

        # The slice is read again, from the cache. Kept in registers it would leave none for the sums over tokens.
        gradient = tl.zeros([WIDTH], tl.float32)
        if normed_gradient_ptr is not None:
            normed_gradient = _load(normed_gradient_ptr, start, columns, mask)
            mix = _load(mix_ptr, start, columns, mask)
            to_weight += normed_gradient * mix * inverse_rms
            gradient = inverse_rms * (normed_gradient * _load(weight_ptr, 0, columns, mask) - normed_share * mix)
        if mix_gradient_ptr is not None:
            gradient += _load(mix_gradient_ptr, start, columns, mask)
        values = _load(values_ptr, start, columns, mask)

        # score = (q . v) / norm(v), so d score / dv = (q - score v / norm) / norm
        score = tl.load(saved_ptr + token)
        norm = tl.load(saved_ptr + num_tokens + token)
        to_dot = tl.div_rn(to_score, norm)
        to_query += to_dot * values
        to_values = taken * gradient + to_dot * (_load(query_ptr, 0, columns, mask) - tl.div_rn(score, norm) * values)
        if values_gradient_ptr is not None:
            to_values += _load(values_gradient_ptr, start, columns, mask)
        if to_values_ptr is not None:
            _store(to_values_ptr, start, columns, to_values, mask)

        to_base = kept * gradient
        if to_row_ptr is not None:
            _store(to_row_ptr, start, columns, to_base, mask)
        if SUM:
            if stream_gradient_ptr is not None:
                to_base += _load(stream_gradient_ptr, start, columns, mask)
            if to_stream_ptr is not None:
                _store(to_stream_ptr, start, columns, to_base, mask)
            if to_output_ptr is not None:
                to_output = to_base + to_values
                _store(to_output_ptr, start, columns, to_output, mask)
    _store(partial_ptr, program * D, columns, to_query, mask)
    if normed_gradient_ptr is not None:
        _store(partial_ptr, (num_programs + program) * D, columns, to_weight, mask)


@triton.jit
def _phase_one_weights(exponentials, total, inverse_total, num_sources, SUM: tl.constexpr):
    """Softmax, or its excess over the uniform weights times n: exactly 0 where all exponentials are 1.

    Every thread computes the weights of all R rows for every source, so the division is done once, before.
    """
    if SUM:
        weights = (exponentials * num_sources - total) * inverse_total
    else:
        weights = exponentials * inverse_total
    return weights


@triton.jit
def _load_scores(scores_ptr, token, rows, num_sources, num_rows, num_tokens, SOURCES: tl.constexpr):
    """A token's scores `[SOURCES, ROWS]`; minus infinity beyond n, 0 beyond R."""
    sources = tl.arange(0, SOURCES)[:, None]
    inside = (sources < num_sources) & (rows[None, :] < num_rows)
    offsets = (sources * num_rows + rows[None, :]) * num_tokens + token
    scores = tl.load(scores_ptr + offsets, mask=inside, other=float("-inf"))
    return tl.where(rows[None, :] < num_rows, scores, 0.0)


@triton.jit(do_not_specialize=["num_tokens", "num_sources", "num_rows"])
def rows_forward(
    scores_ptr,
    sources_ptr,
    rows_ptr,
    offset_ptr,
    num_tokens,
    num_sources,
    num_rows,
    SUM: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SOURCES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """R rows of `phase_one_rows` for one token and WIDTH columns, kept in registers while the sources are read once."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = columns < D
    rows = tl.arange(0, ROWS)
    is_row = rows < num_rows
    scores = _load_scores(scores_ptr, token, rows, num_sources, num_rows, num_tokens, SOURCES)
    largest = tl.max(scores, 0)
    total = tl.sum(tl.exp(scores - largest[None, :]), 0)
    inverse_total = tl.div_rn(1.0, total)
    if tl.program_id(1) == 0:
        if SUM:
            # The logarithm of 1 need not be exactly 0 on a device.
            mean = tl.div_rn(total, num_sources * 1.0)
            offset = -0.5 * (largest + tl.where(mean == 1.0, 0.0, tl.log(mean)))
        else:
            offset = -(largest + tl.log(total))
        tl.store(offset_ptr + rows * num_tokens + token, offset, mask=is_row)

    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for source in range(num_sources):
        score = tl.load(scores_ptr + (source * num_rows + rows) * num_tokens + token, mask=is_row, other=0.0)
        weights = _phase_one_weights(tl.exp(score - largest), total, inverse_total, num_sources, SUM)
        values = _load(sources_ptr, (source * num_tokens + token) * D, columns, mask)
        sums += weights[:, None] * values[None, :]
    pointers = rows_ptr + (rows[:, None] * num_tokens + token) * D + columns[None, :]
    tl.store(pointers, sums.to(rows_ptr.dtype.element_ty), mask=is_row[:, None] & mask[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_sources", "num_rows"])
def rows_backward(
    scores_ptr,
    sources_ptr,
    rows_gradient_ptr,
    offset_gradient_ptr,
    to_scores_ptr,
    to_sources_ptr,
    num_tokens,
    num_sources,
    num_rows,
    SUM: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SOURCES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`phase_one_rows_backward` for one token, in one warp: its sums over rows and over columns need no barrier.

    `to_sources` is added to in place: a token's elements are read and written by its own program alone.
    """
    token = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, ROWS)
    is_row = rows < num_rows
    scores = _load_scores(scores_ptr, token, rows, num_sources, num_rows, num_tokens, SOURCES)
    largest = tl.max(scores, 0)
    exponentials = tl.exp(scores - largest[None, :])
    total = tl.sum(exponentials, 0)
    inverse_total = tl.div_rn(1.0, total)
    slots = tl.arange(0, SOURCES)[:, None]

    to_weights = tl.zeros([SOURCES, ROWS], tl.float32)
    for first in range(0, D, WIDTH):
        columns = first + tl.arange(0, WIDTH)
        mask = columns < D
        pointers = rows_gradient_ptr + (rows[:, None] * num_tokens + token) * D + columns[None, :]
        gradient = tl.load(pointers, mask=is_row[:, None] & mask[None, :], other=0.0).to(tl.float32)
        for source in range(num_sources):
            start = (source * num_tokens + token) * D
            products = tl.sum(gradient * _load(sources_ptr, start, columns, mask)[None, :], 1)
            to_weights += tl.where(slots == source, products[None, :], 0.0)
            if to_sources_ptr is not None:
                score = tl.load(scores_ptr + (source * num_rows + rows) * num_tokens + token, mask=is_row, other=0.0)
                weights = _phase_one_weights(tl.exp(score - largest), total, inverse_total, num_sources, SUM)
                to_source = tl.sum(weights[:, None] * gradient, 0) + _load(to_sources_ptr, start, columns, mask)
                _store(to_sources_ptr, start, columns, to_source, mask)

    softmax = exponentials * inverse_total[None, :]
    if SUM:
        to_weights *= num_sources
    through_all = tl.sum(softmax * to_weights, 0)
    if offset_gradient_ptr is not None:
        to_offset = tl.load(offset_gradient_ptr + rows * num_tokens + token, mask=is_row, other=0.0)
        through_all += 0.5 * to_offset if SUM else to_offset
    to_scores = softmax * (to_weights - through_all[None, :])
    offsets = (slots * num_rows + rows[None, :]) * num_tokens + token
    tl.store(to_scores_ptr + offsets, to_scores, mask=(slots < num_sources) & is_row[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_sources"])
def decode_forward(
    sources_ptr,
    query_ptr,
    floor_ptr,
    output_ptr,
    stream_ptr,
    weight_ptr,
    mix_ptr,
    weights_ptr,
    new_stream_ptr,
    normed_ptr,
    num_tokens,
    num_sources,
    eps,
    OPENS: tl.constexpr,
    SUM: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    SOURCES: tl.constexpr,
):
    """One token of `decode_mix`: the newest source is written, all are scored together chunk by chunk, then summed."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    mask = columns < D
    start = token * D
    if output_ptr is not None:
        output = _load(output_ptr, start, columns, mask)
        newest = ((num_sources - 1) * num_tokens + token) * D
        grown = output
        if not OPENS:
            grown += _load(sources_ptr, newest, columns, mask)
        # Threads read what others write. The first barrier ends all reads of the old values, the second all writes.
        tl.debug_barrier()
        _store(sources_ptr, newest, columns, grown, mask)
        tl.debug_barrier()

    slots = tl.arange(0, SOURCES)
    is_live = slots < num_sources
    starts = (slots * num_tokens + token) * D
    products = tl.zeros([SOURCES, CHUNK], tl.float32)
    squares = tl.zeros([SOURCES, CHUNK], tl.float32)
    for first in range(0, D, CHUNK):
        part = first + tl.arange(0, CHUNK)
        inside = is_live[:, None] & (part < D)[None, :]
        values = tl.load(sources_ptr + starts[:, None] + part[None, :], mask=inside, other=0.0)
        products += values * _load(query_ptr, 0, part, part < D)[None, :]
        squares += values * values
    floor = tl.load(floor_ptr)
    scores = tl.div_rn(tl.sum(products, 1), tl.sqrt_rn(tl.sum(squares, 1) + floor * floor))
    scores = tl.where(is_live, scores, float("-inf"))
    exponentials = tl.exp(scores - tl.max(scores, 0))
    total = tl.sum(exponentials, 0)
    inverse_total = tl.div_rn(1.0, total)
    tl.store(weights_ptr + slots * num_tokens + token, exponentials * inverse_total, mask=is_live)

    weights = _phase_one_weights(exponentials, total, inverse_total, num_sources, SUM)
    mix = tl.zeros([WIDTH], tl.float32)
    for source in range(num_sources):
        weight = tl.sum(tl.where(slots == source, weights, 0.0), 0)
        mix += weight * _load(sources_ptr, (source * num_tokens + token) * D, columns, mask)
    if SUM:
        stream = _load(stream_ptr, start, columns, mask)
        if output_ptr is not None:
            stream = _round(stream + output, new_stream_ptr)
            _store(new_stream_ptr, start, columns, stream, mask)
        mix += stream
    mix = _round(mix, mix_ptr)
    _store(mix_ptr, start, columns, mix, mask)
    if normed_ptr is not None:
        _store_normed(normed_ptr, weight_ptr, mix, _inverse_rms(mix, eps, D), start, columns, mask)
