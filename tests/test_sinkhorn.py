import numpy as np, pytest, torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from self_supervised import sinkhorn
from self_supervised.queue import FeatureQueue
from self_supervised.sinkhorn import sinkhorn_knopp, sinkhorn_labels


def unit_scores(B, K, D=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    z,c = (F.normalize(torch.randn(n, D, generator=g, dtype=torch.float64), dim=1) for n in (B,K))
    return z@c.T

@pytest.mark.parametrize('B,K', [(16,8), (8,16), (5,40), (1,7), (7,1), (1,1)])
@pytest.mark.parametrize('eps,n_iters', [(.05,3), (.03,1), (.5,10), (.05,2)])
def test_equals_reference(B, K, eps, n_iters):
    s = unit_scores(B, K)
    want = torch.from_numpy(reference.sinkhorn(s.tolist(), eps, n_iters))
    torch.testing.assert_close(sinkhorn_knopp(s, eps, n_iters), want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sinkhorn_knopp(s.float(), eps, n_iters), want.float(), rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('B,K', [(64,16), (16,64), (1,8)])
def test_rows_and_columns(dtype, B, K):
    q = sinkhorn_knopp(unit_scores(B, K).to(dtype), n_iters=100)
    assert q.dtype==torch.float32
    torch.testing.assert_close(q.sum(1), torch.ones(B), rtol=0, atol=2e-6)
    torch.testing.assert_close(q.sum(0), torch.full((K,), B/K), rtol=1e-2, atol=1e-4)

@pytest.mark.parametrize('scale', [1e2, 1e4])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_overflow(scale, dtype):
    for s in (unit_scores(32, 10)*scale, torch.full((32,10), scale), torch.full((32,10), -scale), torch.eye(32)[:,:10]*scale):
        q = sinkhorn_knopp(s.to(dtype))
        assert q.isfinite().all()
        torch.testing.assert_close(q.sum(1), torch.ones_like(q[:,0]), rtol=0, atol=2e-6)

def test_large_scores_agree_with_reference():
    s = unit_scores(12, 6)*20 # exp(400): out of float32's and float16's range, within that of extended precision
    want = torch.from_numpy(reference.sinkhorn(s.tolist()))
    torch.testing.assert_close(sinkhorn_knopp(s.float()), want.float(), rtol=1e-3, atol=1e-5)

def test_computed_outside_autocast():
    s = unit_scores(32, 16).float()
    with torch.autocast('cpu', torch.bfloat16): q = sinkhorn_knopp(s)
    assert torch.equal(q, sinkhorn_knopp(s)) and q.dtype==torch.float32

def test_shifting_a_prototype_changes_nothing():
    "Equal mass on prototypes: a score added to all samples of one prototype must cancel"
    s = unit_scores(32, 8)
    torch.testing.assert_close(sinkhorn_knopp(s+torch.arange(8.)[None]*.1), sinkhorn_knopp(s), rtol=1e-8, atol=1e-10)

def test_constant_scores_give_uniform_codes():
    torch.testing.assert_close(sinkhorn_knopp(torch.full((9,5), .3)), torch.full((9,5), .2))

def test_hard():
    s = unit_scores(32, 8)
    q,h = sinkhorn_knopp(s),sinkhorn_knopp(s, hard=True)
    assert torch.equal(h.argmax(1), q.argmax(1)) and torch.equal(h.sum(1), torch.ones(32, dtype=h.dtype)) and ((h==0)|(h==1)).all()

def test_no_gradient():
    s = unit_scores(4, 4).requires_grad_()
    assert not sinkhorn_knopp(s).requires_grad

@pytest.mark.parametrize('kwargs,msg', [(dict(eps=0), 'eps=0 must be positive'), (dict(eps=-1), 'eps=-1')])
def test_wrong_eps(kwargs, msg):
    with pytest.raises(ValueError, match=msg): sinkhorn_knopp(unit_scores(4, 4), **kwargs)

def test_wrong_shape():
    with pytest.raises(ValueError, match=r'\(2, 4, 4\).*samples, prototypes'): sinkhorn_knopp(torch.zeros(2,4,4))

@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize('B,n', [(16,8), (5,0), (300,900)]) # the last in several blocks, with 1,500 prototypes
@pytest.mark.parametrize('hard', [False, True])
def test_queue_takes_part_and_gets_no_codes(B, n, hard, dtype):
    s = unit_scores(B+n, 1500 if B==300 else 12).to(dtype)
    q = sinkhorn_knopp(s[:B], hard=hard, queue=s[B:])
    assert q.shape==(B, s.shape[1])
    torch.testing.assert_close(q, sinkhorn_knopp(s, hard=hard)[:B], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(q, sinkhorn_knopp(s[:B].T.contiguous().T, hard=hard, queue=s[B:].T.contiguous().T), rtol=1e-5, atol=1e-7) # any layout

def plain_log_sinkhorn(s, eps=.05, n_iters=3):
    "In logarithms and one matrix, step by step"
    m = s.double()/eps
    for _ in range(n_iters):
        m = m - m.logsumexp(0)
        m = m - m.logsumexp(1, keepdim=True)
    return m.exp()

@pytest.mark.parametrize('scale,n_iters', [(1, 1), (1, 3), (30, 3), (1e4, 1), (1e4, 40)])
def test_blocks_equal_one_matrix(scale, n_iters):
    s = unit_scores(1000, 1500)*scale # 1.5 million scores: three blocks
    torch.testing.assert_close(sinkhorn_knopp(s, n_iters=n_iters), plain_log_sinkhorn(s, n_iters=n_iters), rtol=1e-6, atol=1e-9)

@pytest.mark.parametrize('n_iters', [1, 3, 200])
@pytest.mark.parametrize('far', [100., 1e4, 1e30])
def test_a_prototype_far_from_every_sample(far, n_iters):
    "exp of its scores is 0 in any float type; it still gets its share"
    s = unit_scores(32, 8).float()
    s[:,0] -= far; s[0] += far; s[1,1] -= far
    q = sinkhorn_knopp(s, n_iters=n_iters)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.ones(32), rtol=0, atol=2e-6)
    if n_iters==200 and far<1e30: torch.testing.assert_close(q.sum(0), torch.full((8,), 4.), rtol=.05, atol=0)

class Look(TorchDispatchMode):
    "Note numbers and place of every tensor that is made"
    def __init__(self):
        super().__init__()
        self.made = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(out, torch.Tensor): self.made.append((out.numel(), out.untyped_storage().data_ptr()))
        return out

def test_memory_is_that_of_the_codes():
    "No tensor larger than a block is made, but the codes"
    s,queue = unit_scores(400, 3000).float(),unit_scores(800, 3000, seed=1).float()
    with Look() as look: q = sinkhorn_knopp(s, queue=queue)
    assert max(n for n,ptr in look.made if ptr!=q.data_ptr()) <= 2**20 < q.numel()

def test_wrong_queue():
    with pytest.raises(ValueError, match=r'queue has shape \(4, 5\).*\(samples, 4\)'): sinkhorn_knopp(unit_scores(4, 4), queue=unit_scores(4, 5))


# Labels of a whole data set

def unit_parts(N, K, D=16, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, D, generator=g, dtype=torch.float64), dim=1).to(dtype) for n in (N,K)]

def off_balance(s, eps, rounds):
    "How far the mass of a prototype is from its share, by the dense codes"
    mass = reference.sinkhorn(s.tolist(), eps, rounds).sum(0)
    return abs(mass/mass.mean()-1).max()

@pytest.mark.parametrize('N,K', [(40,5), (9,9), (5,12), (8,1)])
@pytest.mark.parametrize('eps', [.05, .3])
def test_labels_equal_reference(N, K, eps):
    "The first two rounds, before there is any momentum, and the end; the residual is that of the labels that are returned"
    z,c = unit_parts(N, K)
    for rounds in (1, 2):
        labels,off = sinkhorn_labels(z, c, eps, 0., rounds)
        assert labels.tolist()==reference.balanced_labels((z@c.T).tolist(), eps, rounds).tolist()
        assert off.ndim==0 and off.item()==pytest.approx(off_balance(z@c.T, eps, rounds), rel=1e-6, abs=1e-12)
    labels,off = sinkhorn_labels(z, c, eps, 1e-7, 2000)
    assert off<=1e-7 and off_balance(z@c.T, eps, 600)<1e-4
    assert labels.tolist()==reference.balanced_labels((z@c.T).tolist(), eps, 600).tolist()

def test_momentum_saves_rounds():
    "Images in bunches, a few large ones: the plain form is not there after twice the rounds, and leads to the same labels"
    def plain(rounds):
        q = np.exp((s-s.max())/.05)
        for _ in range(rounds):
            q /= q.sum(0)
            q /= q.sum(1, keepdims=True)
        mass = q.sum(0)
        return q.argmax(1),abs(mass/mass.mean()-1).max()
    g  = torch.Generator().manual_seed(0)
    of = torch.multinomial(1/torch.arange(1., 11), 400, replacement=True, generator=g)
    z  = F.normalize(unit_parts(10, 1)[0][of]+.03*torch.randn(400, 16, generator=g, dtype=torch.float64), dim=1)
    c  = z[torch.randperm(400, generator=g)[:20]]
    s  = (z@c.T).numpy()
    n = next(n for n in range(1, 500) if sinkhorn_labels(z, c, .05, .01, n)[1]<=.01)
    assert 10<n and plain(2*n)[1]>.01
    assert (plain(10_000)[0]==sinkhorn_labels(z, c, .05, 1e-6, 2000)[0].numpy()).all()

def test_rounds_end_at_tol():
    "With the first round that is near enough, and not before"
    z,c = unit_parts(20, 4)
    each = [sinkhorn_labels(z, c, .05, 0., n) for n in range(1, 60)]
    for tol in (.3, .01, .001):
        n = next(i for i,(_,o) in enumerate(each) if o<=tol)
        assert 0<n<58
        for a,b in zip(sinkhorn_labels(z, c, .05, tol), each[n]): assert torch.equal(a, b)

class Reads(TorchDispatchMode):
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('tol', [.3, .01, .001])
def test_a_device_is_seldom_asked_and_gives_the_same(tol, monkeypatch):
    z,c = unit_parts(20, 4)
    with Reads() as every: want = sinkhorn_labels(z, c, .05, tol)
    monkeypatch.setitem(sinkhorn._look_every, 'cpu', 8)
    with Reads() as seldom: got = sinkhorn_labels(z, c, .05, tol)
    assert all(torch.equal(a, b) for a,b in zip(want, got)) and seldom.n==-(-every.n//8)
    for n in (1,5,8): assert all(torch.equal(a, b) for a,b in zip(sinkhorn_labels(z, c, .05, tol, n), sinkhorn_labels(z, c, .05, 0., min(n, every.n))))

@pytest.mark.parametrize('rows', [1, 7, 40])
def test_labels_do_not_depend_on_blocks(monkeypatch, rows):
    z,c = unit_parts(40, 6)
    whole = sinkhorn_labels(z, c)
    seen  = []
    monkeypatch.setattr(sinkhorn, 'block_rows', lambda t,n: seen.append((len(t), n)) or rows)
    parts = sinkhorn_labels(z, c)
    assert seen==[(40,6)] and torch.equal(parts[0], whole[0]) and parts[1].item()==pytest.approx(whole[1].item(), rel=1e-9)

@pytest.mark.parametrize('eps', [.05, .001])
def test_labels_in_float32_and_autocast(eps):
    "Scores are 1,000 apart at the smaller eps; bfloat16 would change a third of the labels"
    z,c = unit_parts(500, 10)
    want,_ = sinkhorn_labels(z, c, eps)
    got,off = sinkhorn_labels(z.float(), c.float(), eps)
    assert (got==want).float().mean()>.98 and off.isfinite()
    with torch.autocast('cpu', torch.bfloat16): again = sinkhorn_labels(z.float(), c.float(), eps)
    assert torch.equal(again[0], got) and torch.equal(again[1], off)

def test_labels_never_hold_all_scores():
    z,c = unit_parts(4000, 500, dtype=torch.float32) # 2 million scores: two blocks
    with Look() as look: sinkhorn_labels(z, c, n_iters=2)
    assert max(n for n,_ in look.made) <= 2**20 < len(z)*len(c)

def test_labels_without_gradient():
    z,c = unit_parts(8, 4)
    assert not sinkhorn_labels(z.requires_grad_(), c.requires_grad_())[1].requires_grad

@pytest.mark.parametrize('kwargs,msg', [(dict(eps=0), 'eps=0 must be positive'), (dict(tol=-1), 'tol=-1 not negative'), (dict(n_iters=0), 'n_iters=0 1 or more: .*200 are usual')])
def test_wrong_arguments_of_labels(kwargs, msg):
    with pytest.raises(ValueError, match=msg): sinkhorn_labels(*unit_parts(8, 4), **kwargs)

@pytest.mark.parametrize('n', [0,-1])
def test_no_rounds_are_no_assignment(n):
    with pytest.raises(ValueError, match=f'n_iters={n} must be 1 or more'): sinkhorn_knopp(unit_scores(8, 4), n_iters=n)

@pytest.mark.parametrize('n', [-1,1.5,None,'4'])
def test_length_of_a_queue(n):
    with pytest.raises(ValueError, match=f'length={n!r} must be a whole number of projections, or 0'): FeatureQueue(n)
    assert not FeatureQueue().full and not FeatureQueue(0).full
