"""nanoGPT's side of a bench, in a process and perhaps an interpreter of its own: torch, no JAX.

It is run as a file, with its task as JSON on stdin: nanoGPT's own model.py, its optimizer and the
iteration of its train.py, or generate() as its sample.py calls it. The last line of stdout is the
result, or {"error": ...}.
"""

import json
import sys
import time
from contextlib import nullcontext
from typing import Any


def main() -> None:
    """Do the task, and print what came of it as the last line."""
    task = json.load(sys.stdin)
    sys.path[0] = task["path"]  # nanoGPT's folder in place of this one
    try:
        result = {"check": check, "train": train, "decode": decode}[task["what"]](task)
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        result = {"error": f"{type(error).__name__}: {said}"[:300]}
    print("\n" + json.dumps(result), flush=True)


def check(task: dict[str, Any]) -> dict[str, Any]:
    """Return the version of torch, once it and nanoGPT's model have been imported."""
    import torch  # pyright: ignore

    network(task)
    if task["device"].startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no GPU")
    return {"torch": torch.__version__}


def network(task: dict[str, Any]) -> tuple[Any, Any]:
    """Return nanoGPT's two classes."""
    from model import GPT, GPTConfig  # pyright: ignore

    return GPT, GPTConfig


def prepared(task: dict[str, Any]) -> tuple[Any, Any, str]:
    """Return nanoGPT's model on its device, its autocast context and the device's type."""
    import torch  # pyright: ignore

    gpt, config = network(task)
    torch.manual_seed(1337)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    device_type = "cuda" if "cuda" in task["device"] else "cpu"
    dtype = getattr(torch, task["dtype"])
    cpu = device_type == "cpu"  # where nanoGPT computes in float32
    context = nullcontext() if cpu else torch.amp.autocast(device_type=device_type, dtype=dtype)
    return gpt(config(**task["model"])).to(task["device"]), context, device_type


def clock(device_type: str) -> float:
    """Return the time once the device has done all it was given."""
    if device_type == "cuda":
        import torch  # pyright: ignore

        torch.cuda.synchronize()
    return time.perf_counter()


def peak(device_type: str) -> Any:
    """Return the bytes that torch held at most on the GPU, None on a CPU."""
    if device_type != "cuda":
        return None
    import torch  # pyright: ignore

    return torch.cuda.max_memory_allocated()


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Return seconds a step of each repeat, of the iteration in nanoGPT's train.py."""
    import torch  # pyright: ignore

    raw, context, device_type = prepared(task)
    scaler = torch.amp.GradScaler(device_type, enabled=task["dtype"] == "float16")
    optimizer = raw.configure_optimizers(
        task["weight_decay"], task["learning_rate"], tuple(task["betas"]), device_type
    )
    model = torch.compile(raw) if task["compile"] else raw
    A, B, T = task["shape"]
    tokens = torch.randint(task["model"]["vocab_size"], (A, B, T + 1), device=task["device"])
    x, y = tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()

    def iteration() -> Any:
        for group in optimizer.param_groups:
            group["lr"] = task["learning_rate"]
        for micro_step in range(A):
            with context:
                _, loss = model(x[micro_step], y[micro_step])
                loss = loss / A
            scaler.scale(loss).backward()
        if task["grad_clip"]:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), task["grad_clip"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss

    began = clock(device_type)
    iteration()
    first = clock(device_type) - began
    for _ in range(task["warmup"]):
        iteration()
    seconds = []
    for _ in range(task["repeats"]):
        began = clock(device_type)
        for _ in range(task["steps"]):
            loss = iteration()
        seconds.append((clock(device_type) - began) / task["steps"])
    return {"seconds": seconds, "first": first, "peak": peak(device_type),
            "loss": loss.item() * A, "torch": torch.__version__}  # fmt: skip


def decode(task: dict[str, Any]) -> dict[str, Any]:
    """Return seconds of each repeat of generate(), as nanoGPT's sample.py calls it."""
    import torch  # pyright: ignore

    model, context, device_type = prepared(task)
    model.eval()
    if task["compile"]:
        model = torch.compile(model)
    prompt = torch.randint(task["model"]["vocab_size"], tuple(task["shape"]), device=task["device"])

    def write(n: int) -> float:
        began = clock(device_type)
        with torch.no_grad(), context:
            model.generate(prompt, n, temperature=task["temperature"], top_k=task["top_k"] or None)
        return clock(device_type) - began

    first = write(min(4, task["new_tokens"]))
    seconds = [write(task["new_tokens"]) for _ in range(task["repeats"])]
    return {"seconds": seconds, "first": first, "peak": peak(device_type),
            "torch": torch.__version__}  # fmt: skip


if __name__ == "__main__":
    main()
