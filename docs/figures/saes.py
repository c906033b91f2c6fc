"""A small SAE on the toy's residual stream: what some features are about, and what they do for the loss."""

import torch

import lens_core as lens
from docs.figures._style import BLUE, GREY, subplots
from lens_core.saes import SaeConfig, SparseAutoencoder, feature_attribution, reconstruction_quality, top_activations

NAME = "blocks.0.hook_resid_post"


def rows_of(model, count, seed):
    """Draw texts of random words whose second half is the first again, as the toy was trained on."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(9, model.cfg.d_vocab, (count, 20), generator=generator)
    return torch.cat([torch.zeros(count, 1, dtype=torch.long), words, words], 1)


def trained(model, *, d_sae=384, k=8, steps=600):
    """Train a top-k SAE on the activations of 1,000 texts."""
    _, cache = model.run_with_cache(rows_of(model, 1000, 0), names_filter=NAME, stop_at_layer=1)
    values = cache[NAME][:, 1:].flatten(0, 1)
    sae = SparseAutoencoder(SaeConfig(d_in=model.cfg.d_model, d_sae=d_sae, architecture="topk", k=k, hook_name=NAME))
    with torch.no_grad():
        sae.b_dec.copy_(values.mean(0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = values[torch.randint(0, len(values), (1024,), generator=generator)]
        loss = (sae(batch) - batch).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sae.requires_grad_(False)


def gain(tokens):
    """Make the metric: the logit of each word that comes for the second time, above the mean logit; summed."""

    def metric(logits):
        told = logits[:, 20:-1]
        return (told.gather(-1, tokens[:, 21:, None])[..., 0] - told.mean(-1)).sum()

    return metric


def ablated(model, sae, tokens, features):
    """Switch each feature off in a forward of its own; give by how much the metric falls."""
    falls, metric = [], gain(tokens)
    with torch.no_grad(), model.saes(sae, use_error_term=True):
        clean = metric(model(tokens))
        for feature in features:

            def off(acts, hook, feature=feature):
                acts[..., feature] = 0
                return acts

            logits = model.run_with_hooks(tokens, fwd_hooks=[(f"{NAME}.hook_sae_acts_post", off)])
            falls.append(float(clean - metric(logits)))
    return torch.tensor(falls)


def write(axes, y, text, colour):
    """Write a snippet with its marked token in colour, in characters of one width."""
    before, _, rest = text.partition("«")
    own, _, after = rest.partition("»")
    style = {"family": "monospace", "fontsize": 8, "transform": axes.transAxes, "va": "center"}
    width = 0.0138
    start = 0.40 - width * len(before)
    axes.text(start, y, before, color=GREY, **style)
    box = {"facecolor": colour, "edgecolor": "none", "pad": 1.2, "alpha": 0.9}
    axes.text(0.40, y, own, color="white", bbox=box, **style)
    axes.text(0.40 + width * len(own), y, after, color=GREY, **style)


def draw():
    """Draw three features with their texts, and two attributions against ablation."""
    model = lens.load("toy:gpt2")
    sae = trained(model)
    tokens = rows_of(model, 30, 2)
    quality = reconstruction_quality(model, sae, tokens, batch_size=30)
    top = top_activations(model, sae, rows_of(model, 200, 1), k=4, window=(3, 2), batch_size=100)
    linear, integrated = (
        feature_attribution(model, sae, tokens, gain(tokens), steps=steps).features for steps in (1, 8)
    )
    fires = (linear != 0).sum((0, 1)).clamp(min=1)
    order = linear.sum((0, 1)).argsort(descending=True)
    some = torch.cat([order[:20], order[20::12]])
    exact = ablated(model, sae, tokens, some.tolist())
    rare = [index for index in exact.argsort(descending=True).tolist() if top.density[some[index]] < 0.02]

    figure, (left, right) = subplots(1, 2, size=(10.0, 4.2), width_ratios=[1.2, 1])
    left.axis("off")
    left.set_title("Three features of the residual stream after block 0", loc="left")
    y = 0.95
    for index in rare[:3]:
        feature = int(some[index])
        effect = float(exact[index] / fires[feature])
        told = (
            f"feature {feature}: on at {float(top.density[feature]):.1%} of tokens, worth {effect:+.1f} logits at each"
        )
        left.text(0.0, y, told, transform=left.transAxes, va="center", fontsize=9)
        for _, text in top.top(feature)[:4]:
            y -= 0.065
            write(left, y, text.replace("<|endoftext|>", "⟨bos⟩ "), BLUE)
        y -= 0.105
    for values, colour, what in ((linear, GREY, "activation x gradient"), (integrated, BLUE, "integrated, 8 steps")):
        found = values.sum((0, 1))[some]
        r = torch.corrcoef(torch.stack([found, exact]))[0, 1]
        right.scatter(found, exact, s=14, color=colour, label=f"{what}: r = {r:.2f}")
    right.axline((0, 0), slope=1, color=GREY, linewidth=0.8)
    right.set_xlabel("attribution (logits)")
    right.set_ylabel("lost by switching the feature off (logits)")
    right.legend(frameon=False, loc="upper left")
    share, count = quality.variance_explained, quality.l0
    right.set_title(
        f"Effect on the right word's logit\n(SAE: {share:.0%} of variance, {count:.0f} features a token)", loc="left"
    )
    return {"saes": figure}
