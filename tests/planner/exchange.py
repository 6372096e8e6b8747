#!/usr/bin/env python3
"""Schedules go to torch.distributed.pipelining and come from there.

From torch: everything that its schedules dump, with and without its communication actions, and in the notation that it had before I, is read and proven by
dualpipe-plan; where torch's own validation refuses an order, dualpipe-plan does too.
To torch: every kind with one holder per stage, and what the search makes of one, is loaded by torch's runtime and trained one step by processes over gloo;
losses and gradients must equal those of the model in one piece.

usage: exchange.py path/to/dualpipe-plan
"""

import csv
import os
import re
import subprocess
import sys
import tempfile
import traceback

SKIPPED = 77  # what CTest takes for "not run"
try:
    import numpy  # noqa: F401, torch needs it to tell the next stage the shapes
    import torch
    import torch.distributed as dist
    import torch.multiprocessing as mp
    from torch.distributed.pipelining import PipelineStage, schedules
except ImportError as error:
    print(f"skipped: {sys.executable} cannot import numpy and torch.distributed.pipelining: {error}")
    sys.exit(SKIPPED)

WIDTH = 8
ROWS = 2  # of one micro-batch
TOLERANCE = 1e-12
STEP_TIMEOUT = 60  # seconds; all runs together take a few

# kind, ranks, micro-batches; zbv and dualpipev have two stages on a rank, interleaved has --chunks
TO_TORCH = [
    ("gpipe", 2, 3, []),
    ("1f1b", 3, 5, []),
    ("zb1p", 3, 5, []),
    ("interleaved", 2, 4, ["--chunks", "3"]),
    ("interleaved", 3, 6, []),
    ("zbv", 3, 7, []),
    ("dualpipev", 2, 5, []),
    ("dualpipev", 3, 6, []),
]


def plan(tool, *arguments):
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, timeout=STEP_TIMEOUT)


def expect(condition, *message):
    if not condition:
        raise AssertionError(" ".join(map(str, message)))


# ---- from torch


class Place:
    """As much of a stage as a schedule looks at before it runs."""

    is_first = is_last = has_backward = False

    def __init__(self, index, num_stages, rank, num_ranks):
        self.stage_index, self.num_stages, self.group_rank, self.group_size = index, num_stages, rank, num_ranks
        self.device, self.group = torch.device("cpu"), None
        self.submod = torch.nn.Identity()


def torch_schedule(name, ranks, chunks, micro_batches):
    kind = schedules.get_schedule_class(name)
    stages = [Place(rank_stage, ranks * chunks, 0, ranks) for rank_stage in range(chunks)]
    if not issubclass(kind, schedules.PipelineScheduleMulti):
        return kind(stages[0], micro_batches, loss_fn=torch.nn.MSELoss())
    return kind(stages, micro_batches, loss_fn=torch.nn.MSELoss())


def without_idle_cells(text):
    return [[cell for cell in row if cell] for row in csv.reader(text.splitlines())]


def check_dump(tool, path, order):
    """dualpipe-plan reads the order that torch has in memory, and says the same about it as torch does."""
    ranks, stages = len(order), 1 + max(leaf.stage_index for row in order.values() for leaf in leaves(row))
    micro_batches = 1 + max(leaf.microbatch_index for row in order.values() for leaf in leaves(row))
    try:
        schedules._validate_schedule(order, ranks, stages, micro_batches)
        valid = True
    except AssertionError:
        valid = False
    checked = plan(tool, "check", path)
    expect((checked.returncode == 0) == valid, path, "valid for torch:", valid, checked.stdout, checked.stderr)
    if valid:
        shown = plan(tool, "show", path, "--format", "csv")
        expect(shown.returncode == 0, shown.stderr)
        compute = [[str(action) for action in row if action is not None and action.is_compute_op]
                   for row in order.values()]
        expect(without_idle_cells(shown.stdout) == compute, path, "reads as another order")
        check_older_notation(tool, path, shown.stdout)
    return valid


def check_older_notation(tool, path, shown):
    """The same dump with B for the input part and BW for the whole backward."""
    with open(path, newline="") as file:
        text = file.read()
    older = os.path.join(os.path.dirname(path), "older.csv")
    with open(older, "w", newline="") as file:
        file.write(re.sub(r"(\d)I(\d)", r"\1B\2", re.sub(r"(\d)B(\d)", r"\1BW\2", text)))
    expect(plan(tool, "show", older, "--format", "csv").stdout == shown, path, "reads as another order in torch's older notation")


def leaves(row):
    for action in row:
        if action is not None and action.is_compute_op:
            yield from action.sub_actions or [action]


def from_torch(tool, folder):
    multi = [
        ("LoopedBFS", 2, 2, 4), ("LoopedBFS", 3, 3, 5), ("Interleaved1F1B", 2, 2, 4), ("Interleaved1F1B", 4, 2, 8),
        ("Interleaved1F1B", 4, 3, 12), ("InterleavedZeroBubble", 2, 2, 4), ("InterleavedZeroBubble", 4, 2, 8),
        ("ZBVZeroBubble", 2, 2, 4), ("ZBVZeroBubble", 4, 2, 8), ("ZBVZeroBubble", 8, 2, 20), ("DualPipeV", 2, 2, 4),
        ("DualPipeV", 3, 2, 9), ("DualPipeV", 4, 2, 10), ("DualPipeV", 8, 2, 20),
    ]  # class, ranks, stages per rank, micro-batches
    for name, ranks, chunks, micro_batches in multi:
        schedule = torch_schedule(name, ranks, chunks, micro_batches)
        schedule._prepare_schedule_with_comms(schedule.pipeline_order)
        for form in ("compute_only", "compute_comms"):
            path = os.path.join(folder, f"{name}_{ranks}_{micro_batches}_{form}.csv")
            schedule._dump_csv(path, format=form)
            order = schedule.pipeline_order if form == "compute_only" else schedule.pipeline_order_with_comms
            expect(check_dump(tool, path, order), path, "is valid in torch's own eyes")
        if name == "DualPipeV":
            ours = plan(tool, "show", "dualpipev", "--ranks", ranks, "--microbatches", micro_batches, "--format", "csv")
            theirs = plan(tool, "show", path, "--format", "csv")
            expect(ours.stdout == theirs.stdout, path, "is another order than our dualpipev")
        print(f"from torch: {name} with {ranks} ranks, {micro_batches} micro-batches")

    # The classes with one stage per rank have an order, but no dump of it. 1F1B's has been wrong on its last rank, so only agreement
    # about it is asked for.
    for name, ranks, micro_batches in (("GPipe", 4, 6), ("1F1B", 2, 4), ("1F1B", 4, 8)):
        order = torch_schedule(name, ranks, 1, micro_batches)._get_pipeline_order()
        path = os.path.join(folder, f"{name}_{ranks}_{micro_batches}.csv")
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows(order[rank] for rank in sorted(order))
        valid = check_dump(tool, path, order)
        print(f"from torch: {name} with {ranks} ranks, {micro_batches} micro-batches, {'' if valid else 'in'}valid for both")


# ---- to torch


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x):
        return torch.tanh(self.linear(x)) + x


def model_and_batch(num_stages, micro_batches):
    torch.manual_seed(1)
    layers = [Layer() for _ in range(num_stages)]
    x, target = (torch.randn(micro_batches * ROWS, WIDTH, dtype=torch.float64) for _ in range(2))
    return layers, x, target


def reference(num_stages, micro_batches):
    layers, x, target = model_and_batch(num_stages, micro_batches)
    losses = [torch.nn.functional.mse_loss(torch.nn.Sequential(*layers)(part), goal)
              for part, goal in zip(x.chunk(micro_batches), target.chunk(micro_batches))]
    torch.stack(losses).mean().backward()
    return [loss.detach() for loss in losses], [[p.grad for p in layer.parameters()] for layer in layers]


def train(path, rank):
    """One step of this rank under torch's runtime, compared with the model in one piece."""
    with open(path, newline="") as file:
        rows = [[schedules._Action.from_str(cell) for cell in row if cell] for row in csv.reader(file)]
    num_stages = 1 + max(leaf.stage_index for row in rows for leaf in leaves(row))
    micro_batches = 1 + max(leaf.microbatch_index for row in rows for leaf in leaves(row))
    group = dist.new_group(list(range(len(rows))))
    if rank >= len(rows):
        return
    layers, x, target = model_and_batch(num_stages, micro_batches)
    held = sorted({leaf.stage_index for leaf in leaves(rows[rank])})
    stages = [PipelineStage(layers[s], s, num_stages, torch.device("cpu"), group=group) for s in held]
    runtime = schedules._PipelineScheduleRuntime(stages, micro_batches, loss_fn=torch.nn.functional.mse_loss)
    runtime._load_csv(path)
    losses = []
    arguments = [x] if held[0] == 0 else []
    if held[-1] == num_stages - 1:
        runtime.step(*arguments, target=target, losses=losses)
    else:
        runtime.step(*arguments)

    expected_losses, expected = reference(num_stages, micro_batches)
    if held[-1] == num_stages - 1:
        torch.testing.assert_close(torch.stack(losses), torch.stack(expected_losses), rtol=TOLERANCE, atol=0)
    for s in held:
        for parameter, gradient in zip(layers[s].parameters(), expected[s]):
            torch.testing.assert_close(parameter.grad, gradient, rtol=TOLERANCE, atol=TOLERANCE)


def run_rank(rank, world, store, paths):
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        for path in paths:
            train(path, rank)
            dist.barrier()
            if rank == 0:
                print(f"trained by torch: {os.path.basename(path)}", flush=True)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # peers that wait for this rank end by themselves or are ended below


def to_torch(tool, folder):
    paths = []
    for kind, ranks, micro_batches, options in TO_TORCH:
        path = os.path.join(folder, f"{kind}_{ranks}x{micro_batches}.csv")
        written = plan(tool, "show", kind, "--ranks", ranks, "--microbatches", micro_batches, *options,
                       "--format", "csv", "--output", path)
        expect(written.returncode == 0, written.stderr)
        paths.append(path)
    path = os.path.join(folder, "searched_dualpipev_3x6.csv")
    searched = plan(tool, "search", "dualpipev", "--ranks", 3, "--microbatches", 6, "--send", 0.4, "--evaluations", 500,
                    "--output", path)
    expect(searched.returncode == 0, searched.stderr)
    paths.append(path)
    world = max(ranks for _, ranks, _, _ in TO_TORCH)
    # Forked, so that torch is loaded once; this process has run nothing of it that starts threads.
    context = mp.get_context("fork")
    workers = [context.Process(target=run_rank, args=(rank, world, os.path.join(folder, "store"), paths))
               for rank in range(world)]
    for worker in workers:
        worker.start()
    failed = False
    for worker in workers:
        worker.join(0 if failed else STEP_TIMEOUT)
        failed = failed or worker.exitcode != 0
    for worker in workers:
        worker.kill()
    expect(not failed, "exit codes of the ranks:", [worker.exitcode for worker in workers])


def main():
    tool = os.path.abspath(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        from_torch(tool, folder)
        to_torch(tool, folder)


if __name__ == "__main__":
    main()
