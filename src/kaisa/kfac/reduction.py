"""Statistics on their way: every rank ─► the owner of each factor, who adds them up (factor steps, packed triangles).

A message is a header in float64 and the sums of a bucket of layers, the same header to everybody:

    | positions, examples, steps of each layer | a layer that could not be decomposed, or 0 | the receiver's triangles |

so that all ranks know how much was summed, and by whom, without a collective of its own. Sizes follow from the
placement alone. Buckets go one by one, the first of them while the backward pass runs. A bucket of which one owner has
far more than the others goes in two steps: a rank adds up an even slice of it, and passes the sums on to the owners.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kaisa.kfac import linalg
from kaisa.kfac.collectives import Collectives, Wait
from kaisa.kfac.factors import Statistics
from kaisa.kfac.payload import Payload, decode, encode, encoded_length
from kaisa.kfac.routes import HEADER, IN_FLIGHT, NOTE, A, G, Key, Piece, Routes, header_bytes, keys_of


@dataclass(frozen=True)
class Counts:
    """How much all ranks have summed of a layer.

    Attributes:
        positions, examples: as in ``Statistics``.
        steps: as in ``Statistics``, the mean over the ranks that have summed anything.
        is_finite: whether every rank's sums are, and any rank has some; None where nobody has looked.
    """

    positions: float | Tensor
    examples: float | Tensor
    steps: float | Tensor = 1.0
    is_finite: Tensor | None = None


class Reduction:
    """Adds up statistics over ranks, each factor's at its owners.

    Args:
        collectives: how to reach the others.
        routes: who owns what.
        payload: in which type sums travel.
        summed_in: the type of each layer's statistics, in which they are added up.
        like: an empty tensor of a type that holds those of all layers, on the device where messages are made.

    Attributes:
        note: the place of a layer, from 1, that this rank cannot decompose any more; goes with the next message.
        noted: the largest note that any rank has sent so far.
        heard: by layer, whether finite sums of it have ever come.
    """

    def __init__(
        self,
        collectives: Collectives,
        routes: Routes,
        payload: Payload,
        summed_in: Mapping[str, torch.dtype],
        like: Tensor,
    ) -> None:
        self.collectives = collectives
        self.routes = routes
        self.form = payload.statistics
        self.summed_in = summed_in
        self.like = like
        self.rank = collectives.rank
        self.world = tuple(range(collectives.world_size))
        self.is_alone = collectives.world_size == 1
        self.note = 0
        self.noted = torch.zeros((), dtype=torch.float64, device=like.device)
        self.heard = {name: torch.zeros((), dtype=torch.bool, device=like.device) for name in routes.shapes}
        self._messages = 0
        self._sent = 0  # buckets of this step that have gone
        self._waits: list[tuple[tuple[str, ...], Wait]] = []  # and have not come yet
        self._added_up: list[Callable[[], dict[Key, Tensor]]] = []
        self._counts: dict[str, Counts] = {}
        self._late: dict[str, Statistics] = {}

    def __call__(self, local: Mapping[str, Statistics]) -> tuple[dict[str, Statistics], dict[str, Counts]]:
        """Sends what has not gone yet, and waits for the sums.

        Args:
            local: this rank's sums; a layer that it has not used counts as zeros.

        Returns:
            The sums of the layers of which this rank owns a side, an empty tensor for a side that it does not own; and
            of all layers how much was summed.
        """
        if self.is_alone:
            return dict(local), {
                name: Counts(sums.positions, sums.examples, sums.steps) for name, sums in local.items()
            }
        buckets = self.routes.statistics_buckets
        gone = {name for bucket in buckets[: self._sent] for name in bucket}
        for bucket in buckets[self._sent :]:
            self._send(bucket, local)
        self._late = {name: sums for name, sums in local.items() if name in gone}
        self._receive(all_but=0)
        sides: dict[Key, Tensor] = {}
        for arrived in self._added_up:
            sides.update({key: self._unpacked(part.to(self.summed_in[key[0]]), key) for key, part in arrived().items()})
        counts = {name: self._counts[name] for name in self.routes.shapes}
        self._sent, self._added_up, self._counts = 0, [], {}
        return self._owned_sums(local, sides, counts), counts

    def _owned_sums(
        self, local: Mapping[str, Statistics], sides: Mapping[Key, Tensor], counts: Mapping[str, Counts]
    ) -> dict[str, Statistics]:
        nowhere = self.like.new_empty(0)
        return {
            name: Statistics(
                sides.get((name, A), nowhere),
                sides.get((name, G), nowhere),
                counts[name].positions,
                counts[name].examples,
                local[name].area if name in local else 1,
                local[name].scale if name in local else 1.0,
                counts[name].steps,
            )
            for name in self.routes.shapes
            if (name, A) in sides or (name, G) in sides
        }

    def is_nobody_heard(self, counts: Mapping[str, Counts]) -> bool:
        """Says whether no rank has summed anything; makes the host wait, for a rank that has nothing else to do."""
        total = torch.stack([torch.as_tensor(count.examples) for count in counts.values()]).sum()
        return not total.cpu().numpy()

    def send_next(
        self, is_complete: Callable[[str], bool], take: Callable[[Sequence[str]], dict[str, Statistics]]
    ) -> None:
        """Sends the buckets that are complete, in their order and while the backward pass goes on.

        When is each rank's own affair: all ranks send all buckets in one order, the last of them when they are called.
        What a layer sums after its bucket has gone, because it is used more often than before, goes with the next.

        Args:
            is_complete: says whether the sums of a layer will not grow any more in this step.
            take: hands over the sums of some layers.
        """
        buckets = self.routes.statistics_buckets
        while self._sent < len(buckets) and all(map(is_complete, buckets[self._sent])):
            bucket = buckets[self._sent]
            self._send(bucket, take(bucket))

    # ------------------------------------------------------------------------------------------------------- sending

    def _send(self, bucket: tuple[str, ...], local: Mapping[str, Statistics]) -> None:
        self._receive(all_but=IN_FLIGHT - 1)
        self._sent += 1
        local = self._with_late(bucket, local)
        seed = self._messages * len(self.world) ** 2 + self.rank  # rounds every message at random in another way
        self._messages += 1
        header = self._header(bucket, local).view(torch.uint8)
        packed = {key: self._packed(local, key) for key in keys_of(bucket)}
        messages = []
        for rank in self.world:
            sums = [packed[key][low:high] for key, low, high in self.routes.pieces(bucket, rank)]
            messages.append(torch.cat((header, encode(sums, self.form, self.like, seed).view(torch.uint8))))
        size = header_bytes(bucket) + self._body_bytes(bucket)
        wait = self.collectives.exchange("statistics", self.world, messages, [size] * len(self.world))
        self._waits.append((bucket, wait))

    def _with_late(self, bucket: tuple[str, ...], local: Mapping[str, Statistics]) -> dict[str, Statistics]:
        """Returns the sums of a bucket's layers and what came too late for the last factor step."""
        result = {name: local[name] for name in bucket if name in local}
        for name in bucket:
            late = self._late.pop(name, None)
            if late is not None:
                if name in result:
                    late.add_(result[name])
                    late.steps = result[name].steps
                result[name] = late
        return result

    def _header(self, bucket: tuple[str, ...], local: Mapping[str, Statistics]) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64, device=self.like.device)
        numbers: list[float | Tensor] = []
        for name in bucket:
            sums = local.get(name)
            if sums is None:
                numbers += [0.0, 0.0, 0.0]
            else:
                is_finite = torch.isfinite(self._sum_sent(sums.a) + self._sum_sent(sums.g))
                positions = torch.where(is_finite, zero + sums.positions, torch.nan)
                numbers += [positions, sums.examples, sums.steps]
        header = torch.tensor(
            [0.0 if isinstance(number, Tensor) else number for number in (*numbers, float(self.note))],
            dtype=torch.float64,
        ).to(self.like.device)
        places = [place for place, number in enumerate(numbers) if isinstance(number, Tensor)]
        if places:
            header[places] = torch.stack([zero + numbers[place] for place in places])
        return header

    def _sum_sent(self, sums: Tensor) -> Tensor:
        """Returns the sum of what the others will see, which a payload of a short range may make infinite."""
        form = self.form
        return sums.to(form).sum(dtype=sums.dtype) if isinstance(form, torch.dtype) else sums.sum()

    def _packed(self, local: Mapping[str, Statistics], key: Key) -> Tensor:
        if key[0] not in local:
            return self.like.new_zeros(self.routes.packed_size(key))
        sums = local[key[0]].g if key[1] else local[key[0]].a
        return (sums if self.routes.factor(key).is_diagonal else linalg.pack(sums)).flatten()

    # ----------------------------------------------------------------------------------------------------- receiving

    def _receive(self, *, all_but: int) -> None:
        """Adds up what has come, the first sent first, until no more than some buckets are on their way."""
        while len(self._waits) > all_but:
            bucket, wait = self._waits.pop(0)
            received = wait()
            self._counts.update(self._read_headers(bucket, [message[: header_bytes(bucket)] for message in received]))
            total = self._added(bucket, [message[header_bytes(bucket) :] for message in received])
            self._added_up.append(self._passed_on(bucket, total))

    def _read_headers(self, bucket: tuple[str, ...], headers: Sequence[Tensor]) -> dict[str, Counts]:
        table = torch.stack([header.clone().view(torch.float64) for header in headers])
        self.noted = torch.maximum(self.noted, table[:, -1].max())
        positions, examples, steps = table[:, :-NOTE].reshape(len(headers), -1, HEADER).unbind(2)
        mean_steps = steps.sum(0) / (steps > 0).sum(0).clamp(min=1)
        total, terms = positions.sum(0), examples.sum(0)
        is_finite = torch.isfinite(total) & (terms > 0)
        result = {}
        for index, name in enumerate(bucket):
            result[name] = Counts(total[index], terms[index], mean_steps[index], is_finite[index])
            self.heard[name] = self.heard[name] | is_finite[index]
        return result

    def _added(self, bucket: tuple[str, ...], received: Sequence[Tensor]) -> Tensor:
        """Returns the sums over ranks, in their order, of what this rank adds up."""
        sizes = self._sizes(bucket)
        first, *others = (decode(body.view(self._wire_type()), sizes, self.form, self.like.dtype) for body in received)
        total = first.clone()
        for other in others:
            total += other
        return total

    def _passed_on(self, bucket: tuple[str, ...], total: Tensor) -> Callable[[], dict[Key, Tensor]]:
        """Returns what waits for the sums of the factors that this rank owns."""
        pieces = self.routes.pieces(bucket, self.rank)
        parts = dict(zip(pieces, total.split(self._sizes(bucket)), strict=True))
        if not self.routes.sliced_buckets[bucket]:
            return lambda: {key: part for (key, _, _), part in parts.items()}
        nothing = self.like.new_empty(0)
        chunks = [
            torch.cat([nothing, *(part for (key, _, _), part in parts.items() if rank in self.routes.owners(key))])
            for rank in self.world
        ]
        mine = [[piece for piece in self.routes.pieces(bucket, rank) if self._owns(piece)] for rank in self.world]
        sizes = [sum(high - low for _, low, high in each) for each in mine]
        wait = self.collectives.exchange("statistics", self.world, chunks, sizes)

        def arrived() -> dict[Key, Tensor]:
            found: dict[Key, list[Tensor]] = {}
            for each, chunk in zip(mine, wait(), strict=True):
                for (key, _, _), part in zip(each, chunk.split([high - low for _, low, high in each]), strict=True):
                    found.setdefault(key, []).append(part)
            return {key: torch.cat(several) for key, several in found.items()}

        return arrived

    def _owns(self, piece: Piece) -> bool:
        return self.rank in self.routes.owners(piece[0])

    def _sizes(self, bucket: tuple[str, ...]) -> list[int]:
        return [high - low for _, low, high in self.routes.pieces(bucket, self.rank)]

    def _body_bytes(self, bucket: tuple[str, ...]) -> int:
        return encoded_length(self._sizes(bucket), self.form) * self._wire_type().itemsize

    def _wire_type(self) -> torch.dtype:
        if self.form is None:
            return self.like.dtype
        return self.form if isinstance(self.form, torch.dtype) else torch.int8

    def _unpacked(self, part: Tensor, key: Key) -> Tensor:
        shape, factor = self.routes.shapes[key[0]], self.routes.factor(key)
        leading = ((shape.uses,) if shape.uses > 1 else ()) + ((factor.blocks,) if shape.has_blocks else ())
        if factor.is_diagonal:
            return part.reshape(*leading, factor.size)
        return linalg.unpack(part.reshape(*leading, -1), factor.size)
