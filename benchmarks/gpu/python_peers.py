#!/usr/bin/env python3
"""Host time per op of the Python pipelines: the package dualpipe 1.0.0, and torch.distributed.pipelining. Prints one line of JSON.

One rank of two runs by itself over the process group `fake`, whose transfers do nothing. Stages are those of `dualpipe-bench-gpu host`: two layers of 64
in bf16, four rows a micro-batch, 16 micro-batches, so that a step is all host. One op is one forward or one backward of a micro-batch on a stage.

  python_peers.py [--device cuda]
"""

import argparse
import json
import sys
import time

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

WIDTH, ROWS, MICRO_BATCHES, STEPS, RANKS = 64, 4, 16, 20, 2


def stage(device):
    layers = [layer for _ in range(2) for layer in (torch.nn.Linear(WIDTH, WIDTH, bias=False), torch.nn.Tanh())]
    return torch.nn.Sequential(*layers).to(device, torch.bfloat16)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(step, device):
    """Microseconds per op: of steps that are waited for one by one, and of steps that follow each other."""
    for _ in range(3):
        step()
    wait(device)
    result = {}
    for name, each in (("synchronous", True), ("asynchronous", False)):
        begin, processor = time.perf_counter(), time.process_time()
        for _ in range(STEPS):
            step()
            if each:
                wait(device)
        wall, processor = time.perf_counter() - begin, time.process_time() - processor
        wait(device)
        ops = STEPS * 2 * MICRO_BATCHES
        result[name] = {"wall_us": round(1e6 * wall / ops, 3), "processor_us": round(1e6 * processor / ops, 3)}
    return result


def python_dualpipe(device):
    import dualpipe

    dualpipe.set_p2p_tensor_shapes([(ROWS, WIDTH)])
    dualpipe.set_p2p_tensor_dtype(torch.bfloat16)
    pipe = dualpipe.DualPipe((stage(device), stage(device)))
    # Each end feeds one half of the micro-batches and computes the loss of the other.
    inputs, labels = (torch.zeros(ROWS * MICRO_BATCHES // 2, WIDTH, dtype=torch.bfloat16, device=device) for _ in range(2))
    return measure(
        lambda: pipe.step(inputs, num_chunks=MICRO_BATCHES, criterion=torch.nn.functional.mse_loss, labels=[labels]), device)


def torch_pipelining(device):
    from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV

    sample = torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16, device=device)
    between = sample.clone().requires_grad_()
    # Rank 0 of a V holds the first and the last stage.
    stages = [PipelineStage(stage(device), number, 2 * RANKS, device, input_args=(first,), output_args=(between,))
              for number, first in ((0, sample), (2 * RANKS - 1, between))]
    schedule = ScheduleDualPipeV(stages, MICRO_BATCHES // 2, loss_fn=torch.nn.functional.mse_loss)
    inputs, targets = (torch.zeros(ROWS * MICRO_BATCHES // 2, WIDTH, dtype=torch.bfloat16, device=device) for _ in range(2))
    return measure(lambda: schedule.step(inputs, target=targets, losses=[]), device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.set_device(0)
        device = torch.device("cuda", 0)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    results = {}
    for name, peer in (("dualpipe", python_dualpipe), ("torch_pipelining", torch_pipelining)):
        try:
            results[name] = peer(device)
        except ImportError as error:
            results[name] = {"skipped": str(error)}
        except Exception as error:  # one that does not run here hides nothing of the other
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
