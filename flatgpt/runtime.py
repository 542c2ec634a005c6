"""
The process and its device: setup() returns the Runtime, which all others ask. Compilation, several processes, peak
FLOP/s, signals. Only this file and machine.py name accelerators and the environment variables of torchrun.
"""

import contextlib
import datetime
import functools
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from flatgpt import machine
from flatgpt.errors import UsageError, UserError, exit_now, first_line

PARALLEL = ('ddp', 'fsdp')
DEEP = 24       # models of more layers are compiled block by block

# Peak of dense bfloat16 matrix products in TFLOP/s, by a part of the device's name (the longest that matches), from the
# data sheets
PEAK_TFLOPS = {
    'A100': 312, 'A800': 312, 'A10': 125, 'A30': 165, 'A40': 150, 'L4': 121, 'L40': 181, 'L40S': 362,
    'H100': 989, 'H100 PCIe': 756, 'H100 NVL': 835, 'H800': 989, 'H200': 989, 'GH200': 989, 'H20': 148,
    'B100': 1750, 'B200': 2250, 'GB200': 2500, 'B300': 2250,
    'RTX 3090': 71, 'RTX 4090': 165, 'RTX 5090': 210, 'RTX A6000': 155, 'RTX 6000 Ada': 364,
}


@dataclass
class Runtime:
    device: torch.device
    dtype: torch.dtype      # of matrix products and activations; weights in training stay in float32
    compile: bool
    rank: int               # of this process among world_size
    world_size: int
    attention: str | None = None   # torch's fused attention kernel of first choice, on a GPU

    @property
    def master(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def say(self, text: str):
        """Print a line on stdout, in the master process only."""
        if self.master:
            print(text, flush=True)

    def notice(self, *lines: str):
        """Print lines on stderr, in the master process only."""
        if self.master:
            sys.stderr.writelines(f'{line}\n' for line in lines)
            sys.stderr.flush()

    def autocast(self):
        """A context in which the matrix products of a forward pass run in dtype."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def grad_scaler(self):
        """The loss scaler that float16 needs (Micikevicius et al., 2018); for other types it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def compile_model(self, model: nn.Module, parallel='ddp'):
        """Compile a model in place; its parameters keep their names. A deep model, or one that FSDP shards, is compiled
        block by block: the code of one block serves all of them, so depth does not add compilation time."""
        if model.config.n_layer <= DEEP and (parallel == 'ddp' or self.world_size == 1):
            model.compile()
            return
        for block in model.transformer.h:
            block.compile()
        # so that the logits of all positions need no memory in float32
        model.logits_and_loss = torch.compile(model.logits_and_loss)

    def wrap(self, model: nn.Module, parallel='ddp', changing=False) -> nn.Module:
        """The module to call in training: with several processes, one that averages gradients over them.

        'ddp' replicates the model in each process (Li et al., 2020). 'fsdp' shards parameters, gradients and optimizer
        state, and gathers a block only while it is needed (ZeRO stage 3, Rajbhandari et al., 2020): model changes in
        place, its parameters become DTensors, its residual stream is in dtype too.
        changing: whether parameters will be frozen or released later, which 'ddp' alone supports.
        """
        if self.world_size == 1:
            return model
        if parallel == 'ddp':
            return DistributedDataParallel(model, [self.device] if self.device.type == 'cuda' else None,
                                           find_unused_parameters=changing)
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # its import needs half a second

        mesh = dist.init_device_mesh(self.device.type, (self.world_size,))
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)   # of gradients
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)

    def average_gradients(self, model: nn.Module, on: bool):
        """A context that switches the averaging of gradients on or off for a forward and backward pass; only the last
        micro-batch of a step needs it."""
        if hasattr(model, 'set_requires_gradient_sync'):   # FSDP
            model.set_requires_gradient_sync(on)
        elif self.world_size > 1 and not on:
            return model.no_sync()
        return contextlib.nullcontext()

    def clip_gradients(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale the gradients so that their norm, over all parameters and processes, is at most max_norm. Returns the
        norm before."""
        return full_tensor(nn.utils.clip_grad_norm_(model.parameters(), max_norm))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes; the tensor becomes the sum."""
        return self.sum(tensor) / self.world_size   # gloo has no average

    def mean_number(self, number: float) -> float:
        """The mean of a number over all processes."""
        return self.mean(torch.tensor(number, dtype=torch.float64)).item()

    def any_process(self, flag: bool) -> bool:
        """Whether flag is true in any process. Between CPUs, so that no GPU is waited for."""
        return self.sum(torch.tensor(int(flag))).item() > 0

    def same_everywhere(self, number: float) -> bool:
        """Whether a number is the same in all processes."""
        return not self.any_process(self.mean_number(number) != number)

    def loss_denominators(self, targets: Tensor) -> Tensor:
        """What to divide the mean losses of the micro-batches of a step by, (M,), so that their sum over all processes
        is the mean over all targets, (M, B, T), that are not negative."""
        n = (targets >= 0).sum(dim=(1, 2)).float()
        return self.mean(n.sum()).clamp(min=1 / self.world_size) / n.clamp(min=1)   # there may be none at all

    def gather_state(self, state):
        """A copy on the CPU of a nested state, for the master process; None for the others. Every process must call it,
        because sharded tensors are gathered."""
        copies = {}   # by the id of the tensor: tied weights stay one tensor

        def copy(tensor):
            if id(tensor) not in copies:
                full = full_tensor(tensor.detach())
                copies[id(tensor)] = torch.empty_like(full, device='cpu').copy_(full) if self.master else None
            return copies[id(tensor)]

        state = tree_map_only(Tensor, copy, state)
        return state if self.master else None

    def reseed(self, seed: int, step: int):
        """Make dropout a function of (seed, step, rank), so that a resumed run drops the same activations."""
        torch.manual_seed(((seed * 1_000_003 + step) * self.world_size + self.rank) % 2**64)

    def sync(self):
        """Wait until the device has finished its work, before a clock is read."""
        if self.device.type != 'cpu':
            getattr(torch, self.device.type).synchronize()

    def peak_memory(self) -> int | None:
        """The most memory used so far, in bytes: of the device, or on a CPU of the process; None if unknown."""
        if self.device.type == 'cuda':
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type == 'mps':
            return torch.mps.driver_allocated_memory()
        with contextlib.suppress(OSError), open('/proc/self/status') as f:   # Linux
            if own := re.search(r'VmHWM:\s*(\d+) kB', f.read()):
                return int(own[1]) * 1024

    def free_memory(self) -> int | None:
        """The memory that can still be used, in bytes: of the device, or on a CPU of this machine or container; None if
        unknown."""
        if self.device.type == 'cuda':
            return torch.cuda.mem_get_info(self.device)[0]
        if self.device.type != 'cpu' or sys.platform != 'linux':
            return None
        with open('/proc/meminfo') as f:
            free = sum(int(kb) * 1024 for kb in re.findall(r'(?:MemAvailable|SwapFree):\s*(\d+) kB', f.read()))
        container = '/sys/fs/cgroup/memory.'
        with contextlib.suppress(OSError, ValueError), open(container + 'max') as f, open(container + 'stat') as stat:
            limit = int(f.read())   # 'max': none
            used = sum(int(n) for n in re.findall(r'^anon (\d+)', stat.read(), re.MULTILINE))   # without files' caches
            free = min(free, max(limit - used, 0))
        return free

    def peak_flops(self) -> float | None:
        """Peak FLOP/s of this device in dtype: from a table, on a CPU measured; None if unknown."""
        if self.device.type == 'cpu':
            return self.measured_flops()
        name = torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else ''
        known = max((part for part in PEAK_TFLOPS if re.search(rf'\b{part}\b', name)), key=len, default=None)
        # TensorFloat-32 runs at half the rate of bfloat16
        return PEAK_TFLOPS[known] * 1e12 / (2 if self.dtype == torch.float32 else 1) if known else None

    def measured_flops(self) -> float:
        """FLOP/s of the fastest of a few square matrix products in dtype."""
        n = 1024 if self.device.type == 'cpu' else 8192
        a, b = torch.randn(2, n, n, device=self.device).to(self.dtype)
        return 2 * n**3 / self.best_time(lambda: a @ b)

    def measured_bandwidth(self) -> float:
        """Bytes per second at which memory is read, by sums of more than the caches hold."""
        x = torch.ones(2**27 if self.device.type == 'cpu' else 2**29, device=self.device, dtype=torch.bfloat16)
        return x.nbytes / min(self.best_time(x.sum), self.best_time(x.view(torch.float32).sum))

    def best_time(self, work: Callable, seconds=1.0) -> float:
        """Seconds of the fastest of at most ten calls, which begin within so many seconds."""
        times = []
        while len(times) < 10 and sum(times) < seconds:
            self.sync()
            t0 = time.perf_counter()
            work()
            self.sync()
            times.append(time.perf_counter() - t0)
        return min(times)

    def describe(self) -> str:
        """The machine in one line, to paste into a bug report."""
        if self.device.type == 'cuda':
            name = torch.cuda.get_device_name(self.device)
        else:
            n = torch.get_num_threads()
            name = f'{platform.machine()}, {n} thread{"s" if n > 1 else ""}'
        kernel = f'{self.attention} attention, ' if self.attention else ''
        compiled = 'compiled' if self.compile else 'not compiled'
        processes = '1 process' if self.world_size == 1 else f'{self.world_size} processes'
        return (f'{self.device} ({name}), {str(self.dtype)[6:]}, {kernel}{compiled}, {processes}, '
                f'torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}')

    def close(self, status=0):
        """End this process with an exit status. One of several exits at once, without the interpreter's clean-up, in
        which communication threads that still hold a tensor would abort it."""
        if self.world_size > 1:
            dist.destroy_process_group()
            exit_now(status)
        if status:
            sys.exit(status)


def setup(device='auto', dtype='auto', compile: str | bool = 'auto', seed=0, training=False, decoding=False,
          earlier: tuple | None = None) -> Runtime:
    """Choose the machine, prepare this process for it, and return the Runtime. Raises UsageError.

    training: whether matrix products decide the speed; then dtype='auto' is bfloat16 on a CPU only if its products
    are measured to be faster. decoding: see machine.pick_dtype(). earlier: (device type, dtype) of the first part of a
    resumed run, which 'auto' keeps.

    Side effects, all of them for the whole process, each in the function that is named:
    - torch's random numbers are seeded;
    - set_compile_cache: torch.compile keeps its code in ~/.cache/flatgpt, unless TORCHINDUCTOR_CACHE_DIR is set;
    - join_process_group, one of several processes: torch.distributed begins, and sys.excepthook exits at once;
    - keep_freed_memory, on a CPU: glibc's malloc does not return memory to the system;
    - on a GPU: it becomes the current device, and float32 products use TensorFloat-32;
    - use_expandable_segments, on a GPU: the allocator's segments grow, unless PYTORCH_ALLOC_CONF is set;
    - prioritize_attention_kernels, on a GPU: fused attention tries the fastest kernel first.
    """
    world_size = num_processes()
    device = machine.pick_device(device, int(os.environ.get('LOCAL_RANK', 0)) if world_size > 1 else None)
    if dtype == 'auto' and earlier and earlier[0] == device.type:
        dtype = earlier[1]
    measure = training and dtype == 'auto' and device.type == 'cpu'
    dtype = machine.pick_dtype(dtype, device, decoding and compile is not True)
    attention = None
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
        machine.use_expandable_segments()
        attention = machine.prioritize_attention_kernels(device, dtype)
    machine.set_compile_cache()
    compile = machine.pick_compile(compile, device)   # its trial allocates memory: the allocator must be set before
    if world_size > 1:
        join_process_group(device)
    if measure and dtype == torch.bfloat16 and not bfloat16_is_faster(world_size):
        dtype = torch.float32
    if device.type == 'cpu':
        machine.keep_freed_memory()
    torch.manual_seed(seed % 2**64)   # the same weights in every process
    return Runtime(device, dtype, compile, int(os.environ.get('RANK', 0)), world_size, attention)


def catch_signals(rt: Runtime) -> list[float]:
    """Let Ctrl-C, SIGTERM and SIGHUP (a closed terminal) only add their time to the list that is returned, so that a
    run can save before it ends. A second one raises KeyboardInterrupt. SIGHUP stays ignored under nohup."""
    signals = []
    terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def on_signal(number, frame):
        if number not in (signal.SIGINT, signal.SIGTERM):   # to write to a closed terminal is an error
            for fd in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        if not signals:
            rt.notice('stopping after this step, once more to leave at once')
        elif rt.world_size == 1 or time.monotonic() - signals[0] > 1:   # torchrun repeats what a scheduler sent to all
            raise KeyboardInterrupt
        signals.append(time.monotonic())

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, on_signal)
    return signals


def num_processes() -> int:
    """How many processes torchrun has started, on all hosts; 1 without torchrun."""
    return int(os.environ.get('WORLD_SIZE', 1))


def restarts() -> int:
    """How often torchrun has started this run again, after failures."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def join_process_group(device: torch.device):
    """Connect to the other processes that torchrun started, here and on other hosts. A process that waits for another
    gives up after DIST_TIMEOUT seconds, 600 if it is not in the environment. Raises UserError."""
    seconds = os.environ.get('DIST_TIMEOUT', '600')
    if not seconds.isdecimal() or int(seconds) == 0:
        raise UsageError(f'DIST_TIMEOUT={seconds}: expected a whole number of seconds')
    timeout = datetime.timedelta(seconds=int(seconds))
    try:
        store, rank, world_size = next(dist.rendezvous('env://', timeout=timeout))
        # torchrun keeps the store over restarts, with the addresses of processes that have ended
        store = dist.PrefixStore(f'start {restarts()}', store)
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo', timeout=timeout,
                                store=store, rank=rank, world_size=world_size)
    except (RuntimeError, ValueError) as error:
        where = f'{os.environ.get("MASTER_ADDR")}:{os.environ.get("MASTER_PORT")}'
        raise UserError(f'the {num_processes()} processes did not meet at {where} within {seconds} s: '
                        f'{first_line(error)}') from None
    sys.excepthook = functools.partial(exit_with_error, sys.excepthook)


def exit_with_error(show, error_type, error, trace):
    """sys.excepthook of one process among several: show the error and exit at once, so that torchrun ends the others.
    Those lose their connection, which is not an error of their own."""
    status = 1
    if issubclass(error_type, dist.DistError) or (error_type is RuntimeError and 'gloo/transport' in str(error)):
        print(f'rank {dist.get_rank()}: lost the connection to another process ({first_line(error)}); the message of '
              f'the process that failed first says why', file=sys.__stderr__)
    else:
        try:
            show(error_type, error, trace)
        except SystemExit as end:
            status = end.code
    exit_now(status)


def bfloat16_is_faster(world_size=1) -> bool:
    """Whether this CPU multiplies matrices in bfloat16 at least a fifth faster than in float32, for all processes: some
    that have the instructions (AVX512-BF16 without AMX) take twice as long."""
    cpu = torch.device('cpu')
    slow, fast = (Runtime(cpu, dtype, False, 0, world_size) for dtype in (torch.float32, torch.bfloat16))
    return fast.mean(torch.tensor(fast.measured_flops() / slow.measured_flops())).item() > 1.2


def recompute(model: nn.Module):
    """Make the blocks of a model drop the activations of their forward pass and recompute them in the backward pass
    (Chen et al., 2016): the same gradients from less memory, for a third more FLOPs."""
    for block in model.transformer.h:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process has; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A DTensor gathered from all processes, each of which must call this; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def distribute_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that every process has, sharded as a parameter is; as it is if the parameter is not sharded."""
    if not hasattr(parameter, 'placements') or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)   # no messages
