"""The contrastive loss of a large batch, forward and backward: plain, in chunks of rows, and with the package memeff.

    python benchmarks/contrastive.py --samples 32768        # on a GPU
    python benchmarks/contrastive.py --samples 1024

Measured numbers are in RESULTS.md. `plain` stores both similarity matrices and their gradients; `chunked` is the
default of `contrastive_loss` above 2^26 similarities. memeff takes the temperature as a number and gives no gradient
for it.
"""

import argparse
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import GB, Results, above, in_turn, name_of
from torch import Tensor

from clipfix.functional.contrastive import MAX_SIMILARITIES, contrastive_loss
from clipfix.training.precision import fp32_products

SCALE = 100.0


def compare(args: argparse.Namespace) -> None:
    """Time all implementations on the same features and compare their gradients."""
    device, samples = args.device, args.samples
    results = Results(f"Contrastive loss, N {samples}, dim {args.dim}, {name_of(device)}", args.json)
    generator = torch.Generator(device).manual_seed(0)
    drawn = [torch.randn(samples, args.dim, generator=generator, device=device) for _ in range(2)]
    image, text = F.normalize(drawn[0], dim=-1), F.normalize(drawn[0] + 5 * drawn[1], dim=-1)  # cosines near 0.2
    trained = [image.requires_grad_(), text.requires_grad_(), torch.tensor(SCALE, device=device, requires_grad=True)]

    def ours(largest: int) -> Callable[[], Tensor]:
        return lambda: contrastive_loss(image, text, image, text, trained[2], 0, max_similarities=largest)

    ways = {"plain": ours(samples**2), "chunked": ours(min(MAX_SIMILARITIES, samples**2 // 8))}
    if device == "cuda" and importlib.util.find_spec("memeff"):
        from memeff import MemoryEfficientCLIPLoss

        memeff = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
        ways["memeff"] = lambda: memeff(image, text)
    held = torch.cuda.memory_allocated() / GB if device == "cuda" else 0.0
    expected: list[Tensor | None] | None = None  # loss and gradients of the first implementation in fp32
    for precision in ("highest", "high") if device == "cuda" else ("highest",):
        plain = None
        for name, way in ways.items():

            def step(way: Callable[[], Tensor] = way) -> Tensor:
                for tensor in trained:
                    tensor.grad = None
                loss = way()
                loss.backward()
                return loss.detach()

            with fp32_products(precision):
                try:
                    loss = step()
                    wall, peak = in_turn({name: step}, args.repeats, device)
                except Exception as error:  # out of memory, or a kernel of memeff that is too large for this GPU
                    wall, why = {}, str(error).partition("\n")[0][:100]
            label = f"{name}, {'TF32' if precision == 'high' else 'fp32'}"
            if not wall:
                results.add(label, note=why)
                continue
            values = [loss, *(tensor.grad for tensor in trained)]
            expected = expected or [None if value is None else value.clone() for value in values]
            pairs = [(a, b) for a, b in zip(values, expected, strict=True) if a is not None and b is not None]
            far = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
            second = min(wall[name])
            plain = plain or second
            results.add(
                label,
                milliseconds=1000 * second,
                speedup=plain / second,
                peak_gb=above(peak[name], held),
                note=f"loss and gradients {far:.0e} off",
            )
    results.show()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32768)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=3, help="the shortest time is reported")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="file for the rows")
    compare(parser.parse_args())
