# SPDX-FileCopyrightText: 2026 The modeling-attnres maintainers
# SPDX-License-Identifier: Apache-2.0
"""Kimi K3's text model written down once more, token by token and in fp64: slow, and without the library's classes."""

import torch


def naive_logits(fields: dict, weights: dict, input_ids: torch.Tensor, queries=None, key_norms=None, block=None):
    """Logits `[T, V]` of one sequence.

    Args:
        fields: of a published `text_config`.
        weights: by Kimi K3's names without `language_model.`.
        input_ids: `[T]`.
        queries, key_norms: `[L, D]`, row l for sublayer l + 1; the last is the output mix. `None` for a PreNorm model.
        block: decoder layers per block.
    """
    weights = {name: value.double() for name, value in weights.items()}
    eps = fields.get("rms_norm_eps", 1e-6)
    embedding = weights["model.embed_tokens.weight"]
    stream = embedding[input_ids]
    finished, open_block = [], stream

    def mix(row):
        if queries is None or row < 0:
            return stream
        sources = torch.stack([*finished, open_block])
        keys = sources / (sources.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        scores = (keys * (queries[row].double() * key_norms[row].double())).sum(-1)
        return (scores.softmax(0)[..., None] * sources).sum(0)

    layers = fields["num_hidden_layers"]
    for layer in range(layers):
        part = _parts_of(weights, f"model.layers.{layer}.")
        read = mix(2 * layer - 1)
        starts_block = queries is not None and layer % block == 0
        if starts_block:
            finished.append(open_block)
        normed = _rms_norm(read, part["input_layernorm.weight"], eps)
        full = layer + 1 in fields["linear_attn_config"]["full_attn_layers"]
        output = (_full_attention if full else _linear_attention)(fields, _parts_of(part, "self_attn."), normed, eps)
        open_block = output if starts_block else open_block + output
        stream = stream + output
        normed = _rms_norm(mix(2 * layer), part["post_attention_layernorm.weight"], eps)
        experts = _parts_of(part, "block_sparse_moe.")
        if experts:
            output = _mixture_of_experts(fields, experts, normed, eps)
        else:
            output = _feed_forward(fields, _parts_of(part, "mlp."), normed)
        open_block, stream = open_block + output, stream + output
    hidden = _rms_norm(mix(2 * layers - 1), weights["model.norm.weight"], eps)
    return hidden @ weights.get("lm_head.weight", embedding).T


def is_dense(fields: dict, layer: int) -> bool:
    """Whether a decoder layer of a published config has no experts."""
    if fields.get("num_experts") is None or layer < fields.get("first_k_dense_replace", 0):
        return True
    return layer % fields.get("moe_layer_freq", 1) != 0


def _parts_of(weights, prefix):
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _gated(fields, gate, up):
    if fields.get("hidden_act", "silu") == "silu":
        return gate * gate.sigmoid() * up
    bound = fields.get("activation_situ_beta") or 1.0
    up_bound = fields.get("activation_situ_linear_beta")
    bounded = up if up_bound is None else up_bound * (up / up_bound).tanh()
    return bound * (gate / bound).tanh() * gate.sigmoid() * bounded


def _feed_forward(fields, w, x, names=("gate_proj", "up_proj", "down_proj")):
    gate, up, down = (w[f"{name}.weight"] for name in names)
    return _gated(fields, x @ gate.T, x @ up.T) @ down.T


def _mixture_of_experts(fields, w, x, eps):
    scores = (x @ w["gate.weight"].T).sigmoid()
    latent = "routed_expert_down_proj.weight" in w
    expert_inputs = x @ w["routed_expert_down_proj.weight"].T if latent else x
    rows = []
    for token in range(len(x)):
        count = fields["num_experts_per_token"]
        chosen = (scores[token] + w["gate.e_score_correction_bias"]).topk(count).indices.tolist()
        shares = scores[token, chosen]
        if fields.get("moe_renormalize", True) and count > 1:
            shares = shares / (shares.sum() + 1e-20)
        outputs = [
            _feed_forward(fields, _parts_of(w, f"experts.{expert}."), expert_inputs[token], ("w1", "w3", "w2"))
            for expert in chosen
        ]
        rows.append(sum(share * output for share, output in zip(shares, outputs)))
    routed = torch.stack(rows) * fields.get("routed_scaling_factor", 1.0)
    if "routed_expert_norm.weight" in w:
        routed = _rms_norm(routed, w["routed_expert_norm.weight"], eps)
    if latent:
        routed = routed @ w["routed_expert_up_proj.weight"].T
    shared = _parts_of(w, "shared_experts.")
    return routed + _feed_forward(fields, shared, x) if shared else routed


def _full_attention(fields, w, x, _):
    heads, rank = fields["num_attention_heads"], fields["kv_lora_rank"]
    nope, rope, width = (fields[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if "q_proj.weight" in w:
        q = x @ w["q_proj.weight"].T
    else:
        q = _rms_norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"], 1e-6) @ w["q_b_proj.weight"].T
    q = q.view(-1, heads, nope + rope)
    compressed = x @ w["kv_a_proj_with_mqa.weight"].T
    latent, shared_key = compressed[:, :rank], compressed[:, rank:]
    kv = _rms_norm(latent, w["kv_a_layernorm.weight"], 1e-6) @ w["kv_b_proj.weight"].T
    kv = kv.view(-1, heads, nope + width)
    outputs = torch.zeros(len(x), heads, width, dtype=x.dtype)
    for token in range(len(x)):
        for head in range(heads):
            keys = torch.cat([kv[: token + 1, head, :nope], shared_key[: token + 1]], dim=-1)
            scores = keys @ q[token, head] / (nope + rope) ** 0.5
            outputs[token, head] = scores.softmax(0) @ kv[: token + 1, head, nope:]
    outputs = outputs.flatten(1)
    if fields.get("mla_use_output_gate", False):
        outputs = outputs * (x @ w["g_proj.weight"].T).sigmoid()
    return outputs @ w["o_proj.weight"].T


def _linear_attention(fields, w, x, eps):
    heads, width = (fields["linear_attn_config"][name] for name in ("num_heads", "head_dim"))
    bound = fields["linear_attn_config"].get("gate_lower_bound")
    q, k, v = (_convolved(x @ w[f"{n}_proj.weight"].T, w[f"{n}_conv1d.weight"]).view(-1, heads, width) for n in "qkv")
    q, k = (part / (part.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    step = (x @ w["b_proj.weight"].T).sigmoid()
    raw = (x @ w["f_a_proj.weight"].T @ w["f_b_proj.weight"].T + w["dt_bias"]).view(-1, heads, width)
    rate = w["A_log"][:heads].exp()[:, None]
    decay = -rate * torch.nn.functional.softplus(raw) if bound is None else bound * (rate * raw).sigmoid()
    state = torch.zeros(heads, width, width, dtype=x.dtype)
    outputs = torch.zeros(len(x), heads, width, dtype=x.dtype)
    for token in range(len(x)):
        state = state * decay[token].exp()[..., None]
        known = torch.einsum("hkv,hk->hv", state, k[token])
        state = state + torch.einsum("hk,hv->hkv", k[token] * step[token][:, None], v[token] - known)
        outputs[token] = torch.einsum("hkv,hk->hv", state, q[token]) / width**0.5
    gate = x @ w["g_proj.weight"].T if "g_proj.weight" in w else x @ w["g_a_proj.weight"].T @ w["g_b_proj.weight"].T
    outputs = _rms_norm(outputs, w["o_norm.weight"], eps).flatten(1) * gate.sigmoid()
    return outputs @ w["o_proj.weight"].T


def _convolved(x, weight):
    weight = weight.view(weight.shape[0], -1)  # [channels, taps], the last tap on the token itself
    taps = weight.shape[1]
    padded = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
    mixed = sum(padded[tap : tap + len(x)] * weight[:, tap] for tap in range(taps))
    return mixed * mixed.sigmoid()
