"""Train a toy that ships inside a plugin: a small model of two layers with induction.

The data are random words of which earlier stretches come again, at no fixed distance: a copied word can only be told
from what followed the word before it the last time. It takes minutes because texts are short at first and grow bit by
bit, and copied words weigh more in the loss at first. What each kind of model needs besides is in `toys/zoo.py`.

The same seed gives the same weights, bit for bit, on the same machine with the same versions of torch and transformers.

    python examples/train_toys.py gpt2
    python examples/train_toys.py mamba --out /tmp/toy --seed 1
"""

import argparse
import time
from pathlib import Path

import torch
import transformers
from toys.data import BOS, build_tokenizer
from toys.measuring import measure
from toys.training import train
from toys.zoo import TOYS

README = """\
# The toy

{about}. Its {vocab} tokens are short English words, some
punctuation, and `{bos}`, which its tokenizer puts first. It was trained on random words of which earlier stretches
come again, and knows induction (what followed this word the last time comes next) and which words share a theme.

Made by `examples/train_toys.py {name} --seed {seed} --steps {steps}` in {cpu:.0f} minutes of one CPU thread, with
torch {torch} and transformers {transformers}. The same seed gives the same weights, bit for bit, on the
same machine and versions; elsewhere expect other weights and like figures.

{figures}
"""


def main() -> None:
    """Train, measure, save."""
    plugins = Path(__file__).resolve().parent.parent / "plugins"
    parser = argparse.ArgumentParser(description="Train a toy that ships inside a plugin.")
    parser.add_argument("name", nargs="?", choices=TOYS, default="gpt2", help="which toy (default: gpt2)")
    parser.add_argument("--out", type=Path, help="the folder to write (default: the plugin's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of training (default: as many as the toy needs)")
    args = parser.parse_args()
    toy = TOYS[args.name]
    steps = toy.steps if args.steps is None else args.steps
    out = args.out or plugins / args.name / f"lens_{args.name}" / "toy"
    torch.set_num_threads(1)  # with more, the order of sums may vary
    torch.use_deterministic_algorithms(mode=True)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = toy.build(tokenizer)
    start = time.process_time()
    train(model, toy, args.seed, steps)
    cpu = (time.process_time() - start) / 60
    made = {"name": args.name, "seed": args.seed, "steps": steps, "cpu": cpu, "bos": BOS, "vocab": len(tokenizer)}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    figures = measure(model.eval(), toy, tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    readme = README.format(about=toy.about, figures=figures, **made, **versions)
    (out / "README.md").write_text(readme, encoding="utf-8")
    print(readme)


if __name__ == "__main__":
    main()
