"The order of a stream: once a pass, in equal parts, out of blocks, and so with any number of processes after any other"
import random

import numpy as np, pytest

from self_supervised.stream_order import StreamOrder

def by_hand(sizes, seed, turn, buffer, together, rank, ranks):
    "The same order, image by image, in Python's own lists"
    ids   = np.random.default_rng([seed, turn]).permutation(len(sizes)).tolist()
    every = [(s,i) for s in ids for i in range(sizes[s])]
    mine  = every[len(every)*rank//ranks:len(every)*(rank+1)//ranks]
    parts = {}
    for s,i in mine: parts.setdefault(s, []).append((s,i))
    parts,read = list(parts.values()),[]
    for g in range(0, len(parts), together):
        left = [(part, [(2*k+1)/(2*len(part)) for k in range(len(part))]) for part in parts[g:g+together]]
        tagged = [(share, j, o) for j,(part,shares) in enumerate(left) for o,share in zip(part, shares)]
        read += [o for *_,o in sorted(tagged, key=lambda o: o[:2])]
    res = []
    for b in range(0, len(read), buffer):
        block = read[b:b+buffer]
        res += [block[k] for k in np.random.default_rng([seed, turn, rank, 0, b//buffer]).permutation(len(block))]
    return res

def some(seed):
    rng = random.Random(seed)
    return [rng.choice([0,1,rng.randrange(40)]) for _ in range(rng.randrange(1, 20))] + [3],rng

@pytest.mark.parametrize('seed', range(30))
def test_by_hand(seed):
    sizes,rng = some(seed)
    ranks,buffer,together = rng.randrange(1, 6),rng.randrange(1, 30),rng.randrange(1, 5)
    order = StreamOrder(sizes, seed, buffer, together)
    for turn in range(2):
        for r in range(ranks):
            s,i = order.shard_of(order(turn, r, ranks))
            assert list(zip(s.tolist(), i.tolist()))==by_hand(sizes, seed, turn, buffer, together, r, ranks)

@pytest.mark.parametrize('seed', range(30))
def test_once_a_pass(seed):
    "however often the number of processes changes in it; what was taken is never given again"
    sizes,rng = some(seed)
    order = StreamOrder(sizes, seed, rng.randrange(1, 30), rng.randrange(1, 5))
    n,done,seen = sum(sizes),[],[]
    for _ in range(4):
        ranks = rng.randrange(1, 7)
        parts = [order(5, r, ranks, done) for r in range(ranks)]
        assert max(map(len, parts))-min(map(len, parts))<=1
        assert sorted(np.concatenate([*seen, *parts]).tolist())==list(range(n))
        taken = [rng.randrange(len(o)+1) for o in parts]
        seen += [o[:k] for o,k in zip(parts, taken)]
        done.append([ranks, taken])

def test_blocks_are_read_in_one_piece():
    "what a block needs are the next images of a few shards"
    order = StreamOrder([100]*50, buffer=64, together=4)
    read,out = order.reading(0),order(0)
    for b in range(0, 5000, 64):
        assert set(out[b:b+64])==set(read[b:b+64])
        assert len(set(order.shard_of(read[b:b+64])[0]))<=8
    place = {}
    for s,i in zip(*order.shard_of(read)):
        assert i==place.get(s, 0) # each shard from its beginning to its end
        place[s] = i+1

def test_passes_and_seeds_differ():
    def o(seed, turn): return StreamOrder([50]*4, seed, 64)(turn).tolist()
    assert len({tuple(o(s, t)) for s in range(3) for t in range(3)})==9
    assert o(1, 2)==o(1, 2)

def test_not_shuffled(): assert StreamOrder([3,0,4], shuffle=False)(1, 1, 2).tolist()==[3,4,5,6]

@pytest.mark.parametrize('kwargs, says', [(dict(sizes=[]), 'numbers of images'), (dict(sizes=[[1]]), 'numbers of images'), (dict(sizes=[1], buffer=0), 'buffer=0'), (dict(sizes=[1], together=0), 'together=0')])
def test_wrong(kwargs, says):
    with pytest.raises(ValueError, match=says): StreamOrder(**kwargs)
