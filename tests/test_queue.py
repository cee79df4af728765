"A queue is what a list of all that came, newest first, begins with"
import random
from copy import deepcopy
from io import BytesIO

import pytest, torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from self_supervised.queue import FeatureQueue

@pytest.mark.parametrize('seed', range(12))
def test_equals_list(seed):
    "Batches of any size, larger than the queue too, other lengths in between, files, copies; and what was read before stays as it was"
    rng,held = random.Random(seed),[]
    A,D,length = rng.choice([1,2]),3,rng.randint(1, 12)
    q,want = FeatureQueue(length),torch.zeros(A,0,D)
    for t in range(60):
        z = torch.rand(A, rng.randint(1, rng.choice([3,30])), D)
        q.push(z)
        want = torch.cat([z, want], 1)[:, :length]
        what = rng.random()
        if what<.1:
            length = rng.randint(1, 12)
            q.resize(A, length, D)
            want = want[:, :length]
        elif what<.2:
            f = BytesIO()
            torch.save(q.state_dict(), f)
            q = FeatureQueue(length)
            q.load_state_dict(torch.load(BytesIO(f.getvalue()), weights_only=True))
        elif what<.3: q = deepcopy(q)
        assert torch.equal(q.feats, want) and q.full==(want.shape[1]==length)
        held.append((q.feats, want))
        for a,b in held: assert torch.equal(a, b)

class Moved(TorchDispatchMode):
    "Numbers that operations have written"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        if not func.is_view and 'empty' not in str(func): self.n += sum(o.numel() for o in tree_leaves(res) if isinstance(o, torch.Tensor))
        return res

def test_a_batch_costs_a_batch():
    q = FeatureQueue(1000)
    for _ in range(101): q.push(torch.rand(1,10,4))
    for seen in (100,1000):
        with Moved() as m:
            for _ in range(seen): q.push(torch.rand(1,10,4))
        assert m.n<=4*seen*10*4 # the batch itself and its way to its place, and the queue moves once in a hundred steps

def test_file_holds_the_stretch_alone():
    q = FeatureQueue(50)
    for _ in range(9): q.push(torch.rand(2,7,4))
    state = q.state_dict()
    assert list(state)==['feats'] and state['feats'].is_contiguous() and state['feats'].untyped_storage().nbytes()==2*50*4*4
    q.push(torch.rand(2,7,4))
    assert not torch.equal(state['feats'], q.feats)
    old = FeatureQueue(50) # a file of a version whose queue was a buffer
    old.load_state_dict({'feats': state['feats']})
    assert torch.equal(old.feats, state['feats']) and old.feats.data_ptr()!=state['feats'].data_ptr()
    with pytest.raises(RuntimeError, match='Unexpected key.*pointer'): old.load_state_dict({**state, 'pointer':torch.zeros(())})

def test_moves_with_the_model_and_is_no_buffer():
    m = nn.Sequential(nn.Linear(2,2), FeatureQueue(5))
    m[1].push(torch.rand(1,3,2))
    assert len(list(m.buffers()))==0 and list(m.state_dict())==['0.weight','0.bias','1.feats']
    want = m[1].feats
    m.double()
    assert m[1].feats.dtype==torch.float64 and torch.equal(m[1].feats, want.double())
    m[1].push(torch.rand(1,3,2))
    assert m[1].feats.dtype==torch.float64 and m[1].feats.shape==(1,5,2)
    assert m.to('meta')[1].feats.device.type=='meta'

def test_backward_after_push():
    "With the keys that the forward pass saw"
    q,x = FeatureQueue(8),torch.rand(3,4, requires_grad=True)
    for _ in range(4): q.push(torch.rand(1,2,4))
    keys = q.feats[0].clone()
    loss = (x@q.feats[0].T).logsumexp(1).sum()
    for _ in range(9): q.push(torch.rand(1,3,4))
    loss.backward()
    torch.testing.assert_close(x.grad, (x@keys.T).softmax(1)@keys)
