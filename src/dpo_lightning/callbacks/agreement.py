"""A number that all processes of a run agree on, one step late, so that none of them waits for it."""

import torch
from lightning.pytorch import Trainer


class Agreement:
    """Gives every process the largest of the numbers that the processes had at the call before.

    To be called on all processes between the same steps. With several, a number is on its way during a whole step,
    whose gradients all processes have to wait for anyway: it has arrived when it is asked for. A single process gets
    its own number at once. Who acts on an agreement starts a new one, or the next call may tell of the same cause.
    """

    def __init__(self) -> None:
        self._sent: tuple[torch.Tensor, torch.distributed.Work | torch.cuda.Event] | None = None

    def __call__(self, trainer: Trainer, number: int) -> int:
        """The largest number of the call before, 0 at the first; of a single process `number`."""
        if trainer.world_size == 1:
            return number
        agreed = 0
        if self._sent is not None:
            word, arrival = self._sent
            arrival.synchronize() if isinstance(arrival, torch.cuda.Event) else arrival.wait()
            agreed = int(word)
        word = torch.full((), number, device=trainer.strategy.root_device)
        work = torch.distributed.all_reduce(word, torch.distributed.ReduceOp.MAX, async_op=True)
        if word.is_cuda:  # reading it there would wait for every step that the GPU has been given
            work.wait()  # by the GPU alone
            copied = torch.cuda.Event()
            self._sent = word.to("cpu", non_blocking=True), copied
            copied.record()
        else:
            self._sent = word, work
        return agreed
