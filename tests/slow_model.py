"""A slow forward pass in float64 NumPy, token by token, written from the description of the architecture.

`w` are the weights by name, float64; `p` the ModelParams; vectors are (D,) and lists of them have T.
"""

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
    """The first token of each token's document within the window, (T,)."""
    starts: list[int] = []
    for t, token in enumerate(tokens):
        begins = t == 0 or (p.attention == "documents" and token == p.bos_id)
        starts.append(t if begins else starts[-1])
    return starts


def attention(w, block, h, tokens, starts, p):
    """Outputs of one block's attention, a list of T vectors, from its inputs `h`, a list of T vectors."""
    dim = p.width // p.heads
    name = f"blocks.{block}.attention."
    queries = [w[name + "query.weight"] @ x for x in h]
    keys = [w[name + "key.weight"] @ x for x in h]
    values = [w[name + "value.weight"] @ x for x in h]

    # The outermost blocks add a row of a value table, which depends on the token alone.
    for table in range(p.value_tables):
        if block in (table, p.layers - p.value_tables + table):
            share = np.repeat(w[name + "table_share"], dim)
            rows = w[f"value_tables.{table}.weight"]
            values = [v + share * rows[token] for v, token in zip(values, tokens, strict=True)]

    out = []
    for t, start in enumerate(starts):
        parts = []
        for head in range(p.heads):
            group = head // (p.heads // p.kv_heads)
            own = slice(group * dim, (group + 1) * dim)
            query = rms(queries[t][head * dim : (head + 1) * dim])
            q = rotated(query, t - start, p.rope_dims, p.rope_base) * w[name + "gain"][head]

            # Softmax over the tokens of the document so far.
            scores = []
            for u in range(start, t + 1):
                k = rotated(rms(keys[u][own]), u - start, p.rope_dims, p.rope_base)
                scores.append(q @ k / math.sqrt(dim))
            weights = np.exp(np.array(scores) - max(scores))
            weights /= weights.sum()
            y = sum(weight * values[u][own] for u, weight in enumerate(weights, start))

            # The component along the token's own value is removed, and the rest is gated.
            direction = values[t][own] / np.linalg.norm(values[t][own])
            y = y - (y @ direction) * direction
            if p.gate_width:
                y = y * 2 / (1 + np.exp(-w[name + "gate"][head] @ h[t][: p.gate_width]))
            parts.append(y)
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
    """Normalised embeddings; each has a share of the one before it, except at the start of a document."""
    rows = [w["embedding.weight"][token] for token in tokens]
    smeared = list(rows)
    for t, token in enumerate(tokens):
        if p.smear_width and t > 0 and token != p.bos_id:
            gate = 1 / (1 + np.exp(-w["smear.gate"] @ rows[t][: p.smear_width]))
            smeared[t] = rows[t] + w["smear.share"] * gate * rows[t - 1]
    return [rms(row) for row in smeared]


def logits(w, tokens, p, looped):
    """Logits (T, V) of a list of T ids."""
    # The order in which blocks are visited; its second half takes the outputs of the first, last first.
    segment = list(range(p.loop_first, p.loop_last + 1))
    middle = segment * (1 + p.loops if looped else 1)
    order = [*range(p.loop_first), *middle, *range(p.loop_last + 1, p.layers)]
    encoder = order[: len(order) // 2]
    decoder = order[len(order) // 2 :]

    x = embeddings(w, tokens, p)
    x0 = list(x)
    starts = document_starts(tokens, p)
    skips = []

    for block in encoder:
        x = block_forward(w, block, x, x0, tokens, starts, p)
        skips.append(x)
    for step, block in enumerate(decoder):
        if skips:
            gate = 1 / (1 + np.exp(-w["skip_gate"][step]))
            weight = (1 - gate) * w["skip_weight"][step]
            x = [weight * skip + gate * v for skip, v in zip(skips.pop(), x, strict=True)]
        x = block_forward(w, block, x, x0, tokens, starts, p)

    z = np.stack([w["embedding.weight"] @ rms(v) for v in x])
    return p.logit_softcap * np.tanh(z / p.logit_softcap)
