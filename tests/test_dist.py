"Two processes (gloo, CPU) give what one gives on the joined batch"
import pytest, torch
import torch.distributed as tdist
import torch.multiprocessing as mp

from self_supervised.dist import all_gather, all_reduce, rank, world_size
from self_supervised.queue import FeatureQueue
from self_supervised.sinkhorn import sinkhorn_knopp


def _worker(r, n, job, folder):
    torch.set_num_threads(1)
    tdist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=r, world_size=n)
    try: torch.save(job(r, n), f'{folder}/{r}.pt')
    finally: tdist.destroy_process_group()

def on_ranks(job, folder, n=2):
    "Results of `job(rank, n)` on each of `n` processes"
    mp.spawn(_worker, (n, job, str(folder)), nprocs=n)
    return [torch.load(folder/f'{r}.pt') for r in range(n)]

def data(n=6, k=4, seed=0): return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def job(r, n):
    "Everything at once, as starting processes is what takes the time"
    mine = data()[r*6//n:(r+1)*6//n].requires_grad_()
    joined = all_gather(mine)
    (joined**3).sum().mul(r+1.).backward() # a loss on each rank, with another weight
    q,s = FeatureQueue(length=7),data().chunk(n)[r].detach()
    for _ in range(2): q.push(torch.stack([s, -s]))
    return dict(me=(rank(), world_size()), joined=joined.detach(), grad=mine.grad, total=all_reduce(s.sum(0)), top=all_reduce(s.amax(0), 'max'), same=s,
                codes=sinkhorn_knopp(s), large=sinkhorn_knopp(s*1e4), queue=q.feats, local=q.local)

@pytest.mark.slow
@pytest.mark.parametrize('n', [2, 3])
def test_ranks_equal_one_process(n, tmp_path):
    x,res = data(),on_ranks(job, tmp_path, n)
    one = FeatureQueue(length=7)
    for _ in range(2): one.push(torch.stack([x, -x]))
    for r,o in enumerate(res):
        assert o['me']==(r, n)
        assert torch.equal(o['joined'], x)
        torch.testing.assert_close(o['total'], x.sum(0)); assert torch.equal(o['top'], x.amax(0))
        assert torch.equal(o['queue'], one.feats)
    # the gradient of a row is what the losses of all ranks say of it: weights 1 + 2 (+ 3)
    torch.testing.assert_close(torch.cat([o['grad'] for o in res]), 3*x**2*sum(range(1, n+1)))
    torch.testing.assert_close(torch.cat([o['codes'] for o in res]), sinkhorn_knopp(x))
    torch.testing.assert_close(torch.cat([o['large'] for o in res]), sinkhorn_knopp(x*1e4))
    parts = torch.cat([o['local'] for o in res], 1) # every projection is brought along by exactly one rank
    assert sorted(parts[0].tolist())==sorted(one.feats[0].tolist())

def test_one_process():
    x = data()
    assert all_gather(x) is x and all_reduce(x) is x and (rank(), world_size())==(0, 1)
