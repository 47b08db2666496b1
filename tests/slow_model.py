"""An independent, slow forward pass in float64 NumPy, written from the description of the architecture, token by token."""

import math

import numpy as np


def rms(x):
    return x / math.sqrt(float(np.mean(x * x)) + 1.1920928955078125e-07)


def rotated(x, position, rope_dims, base):
    out = x.copy()
    half = rope_dims // 2
    for i in range(half):
        angle = position * base ** (-2 * i / rope_dims)
        c, s = math.cos(angle), math.sin(angle)
        out[i] = x[i] * c + x[half + i] * s
        out[half + i] = -x[i] * s + x[half + i] * c
    return out


def document_starts(tokens, p):
    """Where the document of each token begins: at its last BOS, else at the window's first token."""
    starts: list[int] = []
    for t, token in enumerate(tokens):
        begins = t == 0 or (p.attention == "documents" and token == p.bos_id)
        starts.append(t if begins else starts[-1])
    return starts


def attention(w, block, h, tokens, starts, p):
    """h: list of T vectors; returns the list of T outputs."""
    dim = p.width // p.heads
    name = f"blocks.{block}.attention."
    queries, keys, values = (
        [w[name + kind + ".weight"] @ x for x in h] for kind in ("query", "key", "value")
    )
    for table in range(p.value_tables):
        if block in (table, p.layers - p.value_tables + table):
            share = np.repeat(w[name + "table_share"], dim)
            values = [
                v + share * w[f"value_tables.{table}.weight"][token]
                for v, token in zip(values, tokens, strict=True)
            ]
    out = []
    for t, start in enumerate(starts):
        parts = []
        for head in range(p.heads):
            group = head // (p.heads // p.kv_heads)
            own = slice(group * dim, (group + 1) * dim)
            q = (
                rotated(rms(queries[t][head * dim : (head + 1) * dim]), t - start, p.rope_dims, p.rope_base)
                * w[name + "gain"][head]
            )
            seen = [
                rotated(rms(keys[u][own]), u - start, p.rope_dims, p.rope_base) for u in range(start, t + 1)
            ]
            scores = np.array([q @ k / math.sqrt(dim) for k in seen])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            y = sum(weight * values[u][own] for u, weight in enumerate(weights, start))
            direction = values[t][own] / np.linalg.norm(values[t][own])
            parts.append(y - (y @ direction) * direction)
            if p.gate_width:
                parts[-1] = parts[-1] * 2 / (1 + np.exp(-w[name + "gate"][head] @ h[t][: p.gate_width]))
        out.append(w[name + "output.weight"] @ np.concatenate(parts))
    return out


def mlp(w, block, x):
    z = w[f"blocks.{block}.mlp.up.weight"] @ x
    return w[f"blocks.{block}.mlp.down.weight"] @ np.where(z > 0, z * z, 0.25 * z * z)


def block_forward(w, block, x, x0, tokens, starts, p):
    scale = 1 / math.sqrt(block + 1)
    mix = w[f"blocks.{block}.mix"]
    s_a, s_m = w[f"blocks.{block}.attention_scale"], w[f"blocks.{block}.mlp_scale"]
    u = [mix[0] * a + mix[1] * b for a, b in zip(x, x0, strict=True)]
    h = [rms(v) * scale for v in u]
    a = attention(w, block, h, tokens, starts, p)
    if block >= p.parallel_from:
        return [u[t] + s_a * a[t] + s_m * mlp(w, block, h[t]) for t in range(len(x))]
    y = [u[t] + s_a * a[t] for t in range(len(x))]
    return [y[t] + s_m * mlp(w, block, rms(y[t]) * scale) for t in range(len(x))]


def embeddings(w, tokens, p):
    """Normalised embeddings, each with a share of the one before it but at the start of a document."""
    rows = [w["embedding.weight"][token] for token in tokens]
    smeared = list(rows)
    for t, token in enumerate(tokens):
        if p.smear_width and t > 0 and token != p.bos_id:
            smeared[t] = (
                rows[t]
                + w["smear.share"] / (1 + np.exp(-w["smear.gate"] @ rows[t][: p.smear_width])) * rows[t - 1]
            )
    return [rms(row) for row in smeared]


def logits(w, tokens, p, looped):
    """w: name -> float64 array; tokens: list of ids; returns (T, V) float64."""
    segment = list(range(p.loop_first, p.loop_last + 1))
    order = (
        list(range(p.loop_first))
        + segment * (1 + p.loops if looped else 1)
        + list(range(p.loop_last + 1, p.layers))
    )
    encoder, decoder = order[: len(order) // 2], order[len(order) // 2 :]
    x = embeddings(w, tokens, p)
    x0, stack, starts = list(x), [], document_starts(tokens, p)
    for block in encoder:
        x = block_forward(w, block, x, x0, tokens, starts, p)
        stack.append(x)
    for step, block in enumerate(decoder):
        if stack:
            skipped = stack.pop()
            gate = 1 / (1 + np.exp(-w["skip_gate"][step]))
            x = [
                (1 - gate) * (w["skip_weight"][step] * s) + gate * v for s, v in zip(skipped, x, strict=True)
            ]
        x = block_forward(w, block, x, x0, tokens, starts, p)
    z = np.stack([w["embedding.weight"] @ rms(v) for v in x])
    return p.logit_softcap * np.tanh(z / p.logit_softcap)
