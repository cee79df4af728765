"""A cluster on paper: 64 processes with 8 threads each stream 10,000 shards, are stopped in the middle of a pass, and 32 go on. No image is read: what is
checked is the order, on which all else depends.

    python examples/shards_on_paper.py
"""
import numpy as np
from fastcore.script import call_parse

from self_supervised.stream_order import StreamOrder
from self_supervised.streams import ImageStream

@call_parse
def main(
    shards:int=10_000, # archives
    most:int=1500, # images of the largest; they have 500 and more
    ranks:int=64, # processes that begin
    later:int=32, # processes that go on
    bs:int=64, # images of a batch, on each
    buffer:int=2000, # images of a block
):
    "Prove that a pass has each image once, that all processes have as many, and that both holds after the change"
    rng   = np.random.default_rng(0)
    order = StreamOrder(rng.integers(500, most, shards), seed=1, buffer=buffer)
    def once(parts):
        count = np.zeros(len(order), np.int8)
        for o in parts: np.add.at(count, o, 1)
        return (count==1).all()
    parts = [order(0, r, ranks) for r in range(ranks)]
    sizes = [len(o) for o in parts]
    assert once(parts) and max(sizes)-min(sizes)<=1
    opened = [len(np.unique(order.shard_of(o)[0])) for o in parts]
    print(f'{len(order):,} images in {shards:,} shards, {ranks} processes: each image once, {min(sizes):,} to {max(sizes):,} of them and {min(opened)} to {max(opened)} shards for each process')
    print(f'of {shards:,} shards {sum(opened)-shards} are opened by two')

    steps = sizes[0]//bs//3 # a third of the pass; some processes are a batch ahead, and have skipped some images
    states = [dict(turn=0, at=(steps+r%2)*bs+r%5, done={}, bad={}, seen=0) for r in range(ranks)]
    done   = ImageStream([], order, bs, None).joined(states)['done'][0]
    taken  = [o[:s['at']] for o,s in zip(parts, states)]
    rest   = [order(0, r, later, done) for r in range(later)]
    sizes  = [len(o) for o in rest]
    assert once([*taken, *rest]) and max(sizes)-min(sizes)<=1
    print(f'stopped after {sum(map(len, taken)):,} images; {later} processes go on: the others once, {min(sizes):,} to {max(sizes):,} for each')
