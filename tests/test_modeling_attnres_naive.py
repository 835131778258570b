# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Every backbone in three forms beside a naive model: the plain model's own parts, called by hand, with naive mixes."""

import pytest
import torch
from tiny_backbones import BACKBONES, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

from modeling_attnres import naive_depth_attention


FORMS = {"full": (1, "mean"), "block": (3, "mean"), "sum": (2, "sum")}
NEW_TOKENS = 4


def plain_model(model):
    """The library's model with the same weights."""
    plain = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    weights = model.state_dict()
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert not missing
    assert all("depth_attention" in name for name in unexpected)
    return plain


def recorded_calls(plain, **inputs) -> list[list[tuple]]:
    """By decoder layer, its four parts in the order of their calls, each with the further arguments it was given."""
    calls = [[] for _ in plain.model.layers]
    hooks = []
    for layer, found in zip(plain.model.layers, calls, strict=True):
        for part in layer.children():

            def note(part, args, kwargs, found=found):
                kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                found.append((part, args[1:], kwargs))

            hooks.append(part.register_forward_pre_hook(note, with_kwargs=True))
    plain(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert {len(found) for found in calls} == {4}
    return calls


def naive_mix(reader, *arguments):
    """What sublayer `reader` reads; L is the output mix."""
    return naive_depth_attention(*arguments)[0]


def naive_logits(model, plain, input_ids, attention_mask, mix=naive_mix):
    """Logits `[B, T, V]` without a cache: after every sublayer a mix of all sources, as the paper writes it."""
    depth, config = model.model.depth_attention, model.config
    calls = recorded_calls(plain, input_ids=input_ids, attention_mask=attention_mask)
    sources = [plain.model.embed_tokens(input_ids)]
    hidden_states = sources[0]
    for sublayer in range(config.num_sublayers):
        parts = calls[sublayer // 2]
        (norm, *_), (part, args, kwargs) = parts[2 * (sublayer % 2)], parts[2 * (sublayer % 2) + 1]
        output = part(norm(hidden_states), *args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        if sublayer % config.sublayers_per_block == 0:
            sources.append(output)
        else:
            sources[-1] = sources[-1] + output
        query, key_norm = depth.query[sublayer], depth.key_norm[sublayer]
        hidden_states = mix(sublayer + 1, torch.stack(sources), query, key_norm, depth.eps, config.depth_weights)
    return plain.lm_head(plain.model.norm(hidden_states))


def assert_close(found, expected):
    # fp32: two phases sum in another order, and linear attention runs in chunks or step by step.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", BACKBONES)
@torch.no_grad()
def test_prefill_padding_cached_steps_and_generation(model_type, form):
    model = tiny_model(model_type, *FORMS[form])
    plain = plain_model(model)
    prompt = tiny_inputs()
    mask = torch.ones_like(prompt)
    assert_close(model(prompt).logits, naive_logits(model, plain, prompt, mask))

    mask[0, :5] = 0
    tokens, expected = prompt, []
    for _ in range(NEW_TOKENS):
        expected.append(naive_logits(model, plain, tokens, mask))
        tokens = torch.cat([tokens, expected[-1][:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    real = mask[:, : prompt.shape[1]].bool()
    assert_close(model(prompt, attention_mask=real.long()).logits[real], expected[0][real])

    generated = model.generate(
        prompt,
        attention_mask=real.long(),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(generated.sequences, tokens)
    for step, logits in enumerate(generated.logits):
        assert_close(logits, expected[step][:, -1])
