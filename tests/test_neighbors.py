"Search, copies, outliers, clusters and selection, against loops over all pairs"
import itertools, math

import numpy as np, pytest, torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from self_supervised import neighbors
from self_supervised.neighbors import duplicate_threshold, find_duplicates, find_outliers, find_similar, nearest
from self_supervised.selection import cluster, select

def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def cosine(a, b):
    a,b = a.double().tolist(),b.double().tolist()
    return sum(x*y for x,y in zip(a, b))/math.sqrt(sum(x*x for x in a)*sum(y*y for y in b))

def slow_nearest(features, query, k, own=None):
    found = sorted(((-cosine(query, o),i) for i,o in enumerate(features) if i!=own))[:k]
    return [-s for s,_ in found],[i for _,i in found]

# Search

@pytest.mark.parametrize('dtype', (torch.float16, torch.float32, torch.float64))
@pytest.mark.parametrize('chunk', (7, 4096))
def test_nearest(dtype, chunk):
    x,q = rand(60, 5).to(dtype),rand(9, 5, seed=1).to(dtype)
    sims,ids = nearest(x, q, 4, chunk=chunk)
    for o,s,i in zip(q, sims, ids):
        ref,at = slow_nearest(x, o, 4)
        assert i.tolist()==at
        assert s.tolist()==pytest.approx(ref, abs=1e-6)

@pytest.mark.parametrize('chunk', (7, 4096))
def test_an_image_is_not_similar_to_itself(chunk):
    x = rand(30, 4)
    x = torch.cat([x, x[:3]])
    sims,ids = find_similar(x, [30,2,17], k=5, chunk=chunk)
    for q,s,i in zip((30,2,17), sims, ids):
        ref,at = slow_nearest(x, x[q], 5, q)
        assert i.tolist()==at and s.tolist()==pytest.approx(ref, abs=1e-6)
    assert ids[0,0]==0 and ids[1,0]==32

def test_all_there_are():
    x = rand(6, 3)
    assert find_similar(x, 2, k=50)[1].sort().values.tolist()==[[0,1,3,4,5]]
    assert find_similar(x, x[2], k=50)[1].shape==(1,6)

def test_by_faiss():
    pytest.importorskip('faiss')
    x = F.normalize(rand(4000, 16), dim=1) + rand(40, 16, seed=1).repeat(100, 1)
    near = find_similar(x, list(range(500)), k=10)[1]
    far  = find_similar(x, list(range(500)), k=10, exact=False)[1]
    assert np.mean([len(set(a)&set(b))/10 for a,b in zip(near.tolist(), far.tolist())])>.95
    assert not (far==torch.arange(500)[:,None]).any()
    half = find_similar(x.half(), list(range(500)), k=10, exact=False)[1]
    assert np.mean([len(set(a)&set(b))/10 for a,b in zip(near.tolist(), half.tolist())])>.9

def test_without_faiss(monkeypatch):
    import builtins
    real = builtins.__import__
    monkeypatch.setattr(builtins, '__import__', lambda name, *a, **k: (_ for _ in ()).throw(ImportError()) if name=='faiss' else real(name, *a, **k))
    with pytest.raises(ImportError, match=r"pip install 'self_supervised\[faiss\]'"): find_similar(rand(9,2), 0, exact=False)

@pytest.mark.parametrize('query,says', ((9,'from 0 to 8'), (-1,'from 0 to 8'), ([],'from 0 to 8'), (torch.zeros(1,3),'take the same encoder')))
def test_wrong_queries(query, says):
    with pytest.raises(ValueError, match=says): find_similar(rand(9,2), query)

def test_wrong_features():
    with pytest.raises(TypeError, match=r'must be a tensor \(N,F\) of floats'): find_similar(np.zeros((3,2)), 0)
    with pytest.raises(TypeError, match='torch.int64'): find_similar(torch.zeros(3,2).long(), 0)
    x = rand(9,2); x[4,1] = torch.inf
    for f in (lambda: find_similar(x, 0), lambda: find_duplicates(x), lambda: find_outliers(x), lambda: cluster(x), lambda: select(x, 2)):
        with pytest.raises(FloatingPointError, match='1 of 9 rows'): f()

# Copies

def slow_groups(x, threshold):
    groups = [{i} for i in range(len(x))]
    for i,j in itertools.combinations(range(len(x)), 2):
        if cosine(x[i], x[j])>=threshold:
            a,b = (next(g for g in groups if k in g) for k in (i,j))
            if a is not b:
                groups.remove(b)
                a |= b
    return sorted(sorted(g) for g in groups if len(g)>1)

@pytest.mark.parametrize('threshold', (.999, .97, .8))
@pytest.mark.parametrize('chunk', (11, 4096))
def test_duplicates(threshold, chunk):
    x = rand(50, 4)
    x = torch.cat([x, x[:10]*3+.03*rand(10, 4, seed=1), x[:3]+.3*rand(3, 4, seed=2)])
    assert sorted(find_duplicates(x, threshold, chunk=chunk))==slow_groups(x, threshold)
    assert all(g==sorted(g) for g in find_duplicates(x, threshold)) # without sizes the first comes first

def test_the_largest_first_and_sets():
    x = rand(40, 8)
    far = torch.tensor([.002,.004,0.,.006,.001,.003])[:,None]*rand(6, 8, seed=1)
    x = torch.cat([x, x[[0,1,2,3,0,1]]+far])
    sizes = [100]*46; sizes[41] = 300; sizes[44] = 200
    sets  = ['train']*40+['train','train','test','train','train','train']
    with pytest.warns(UserWarning, match='1 groups of copies have images of several sets .test, train.'):
        groups = find_duplicates(x, .999, sizes, sets)
    assert groups==[[2,42], [44,0,40], [41,1,45], [3,43]] # those of two sets, then the surest

def test_duplicates_by_faiss():
    pytest.importorskip('faiss')
    x = rand(3000, 16)
    x = torch.cat([x, x[:40]+.01*rand(40, 16, seed=1)])
    assert sorted(find_duplicates(x, .999, exact=False))==sorted(find_duplicates(x, .999))!=[]

def test_the_threshold_follows_the_features():
    x = rand(400, 8)
    d = sorted(1-slow_nearest(x, x[i], 10, i)[0][-1] for i in range(0, 400, 4))
    assert 1-duplicate_threshold(x)==pytest.approx(np.median(d)/10, rel=.1)
    shifted = x+20 # cosines near 1, as of features that are never negative
    assert 1-duplicate_threshold(shifted)<.01*(1-duplicate_threshold(x))
    twice = torch.cat([x, x]) # where everything is there twice it is not 1
    assert sorted(find_duplicates(twice))==[[i,i+400] for i in range(400)]

# Outliers

@pytest.mark.parametrize('chunk', (9, 4096))
def test_outliers(chunk):
    x = rand(40, 4)
    ref = [1-np.mean(slow_nearest(x, x[i], 6, i)[0]) for i in range(40)]
    assert find_outliers(x, 6, chunk=chunk).tolist()==pytest.approx(ref, abs=1e-6)
    pytest.importorskip('faiss')
    assert find_outliers(x, 6, exact=False).argmax()==np.argmax(ref)

# Clusters

def blobs(sizes, d=8, spread=.3, seed=0): return torch.cat([F.one_hot(torch.tensor(i), d)*4.+spread*rand(n, d, seed=seed+i) for i,n in enumerate(sizes)])

@pytest.mark.parametrize('n', (2, 4, 6))
def test_as_many_clusters_as_there_are(n):
    sizes = [100*(n-i) for i in range(n)]
    found = cluster(blobs(sizes))
    assert found.n==n and found.labels.bincount().tolist()==sizes
    assert found.why.startswith(f'{n} clusters: the largest number for which two halves')
    x = F.normalize(blobs(sizes), dim=1)
    for i in range(n): assert F.cosine_similarity(found.centres[i], x[found.labels==i].mean(0), dim=0)>.9999

def test_a_number_that_was_asked_for():
    found = cluster(blobs([50,40,30]), 3)
    assert found.n==3 and found.why=='3 clusters, as asked'
    with pytest.raises(ValueError, match='from 1 to 120'): cluster(blobs([50,40,30]), 121)
    assert cluster(rand(10, 3)).n==1

# Selection

def test_one_of_each_kind_the_largest_first():
    x = blobs([80,60,40,20])
    ids = select(x, 4)
    assert [o//1 for o in np.searchsorted([80,140,180,200], ids, side='right')]==[0,1,2,3]
    for i,(lo,hi) in zip(ids, ((0,80),(80,140),(140,180),(180,200))): # it is the one nearest to the 20 nearest in its cluster
        u = F.normalize(x[lo:hi], dim=1).double()
        d = torch.cdist(u, u).sort(1).values[:,1:min(20, hi-lo-1)+1].mean(1)
        assert i-lo==d.argmin()

def test_kinds_that_have_a_label_come_later():
    x = blobs([80,60,40,20])
    ids = select(x, 2, labelled=[0,100])
    assert sorted(np.searchsorted([80,140,180,200], ids, side='right').tolist())==[2,3]
    rest = select(x, 50, labelled=list(range(150)))
    assert sorted(rest.tolist())==list(range(150,200))

def test_k_centre():
    x = rand(60, 5)
    u = F.normalize(x, dim=1)
    have,ref = [3,7],[]
    for _ in range(5):
        far = [min(1-cosine(u[i], u[j]) for j in have+ref) if i not in have+ref else -1 for i in range(60)]
        ref.append(int(np.argmax(far)))
    assert select(x, 5, labelled=[3,7], how='k-centre').tolist()==ref
    first = select(x, 3, how='k-centre').tolist()
    assert first[0]==max(range(60), key=lambda i: cosine(u[i], u.mean(0))) and len(set(first))==3

def test_selection_is_refused():
    x = rand(10, 3)
    for kw,says in ((dict(n=11),'n=11 of 10'), (dict(n=0),'n=0'), (dict(n=3, labelled=[10]),'labelled holds 10'), (dict(n=9, labelled=[1,2]),'n=9 of 8'), (dict(n=2, how='best'),"must be 'typical'")):
        with pytest.raises(ValueError, match=says): select(x, **kw)

def test_a_large_set_is_drawn_from(monkeypatch):
    from self_supervised import selection
    monkeypatch.setattr(selection, '_most', 8)
    x = rand(300, 3)
    first = select(x, 40)
    assert len(first.unique())==40 # more than there are clusters
    assert len(torch.cat([first, select(x, 40, labelled=first)]).unique())==80

def test_copies_are_chosen_once():
    for how in ('typical','k-centre'): assert len(select(torch.ones(20, 3), 5, labelled=[0], how=how).unique())==5


# A GPU, which is pretended: fake tensors have a device and no values, and refuse whatever would read one

@pytest.fixture
def memory(monkeypatch):
    "Free memory of the card, in GB"
    def _set(gb): monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda d: (int(gb*1e9), int(gb*1e9)))
    _set(75)
    return _set

def test_blocks_and_bank_on_a_gpu(memory):
    "Blocks, and a bank that is sent once if half of the memory has room for it"
    cuda = torch.device('cuda')
    for gb,rows in ((75,16384), (10,4096), (1,4096), (600,32768)):
        memory(gb)
        assert neighbors._blocks(None, cuda)==rows and rows**2*4<=max(gb*1e9/64, 4096**2*4)
    assert neighbors._blocks(None, torch.device('cpu'))==4096 and neighbors._blocks(7, cuda)==7
    with FakeTensorMode():
        x = torch.empty(1_280_000, 2048, dtype=torch.float16) # 5.2 GB
        for gb,there in ((80,'cuda'), (10,'cpu')):
            memory(gb)
            assert neighbors._there(x, cuda).device.type==there
        assert neighbors._there(x, torch.device('cpu')) is x

class Bytes(TorchDispatchMode):
    "Bytes sent to the card, and those of the largest new tensor there"
    def __init__(self): super().__init__(); self.sent,self.most = 0,0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res = func(*args, **(kwargs or {}))
        if isinstance(res, torch.Tensor) and res.is_cuda:
            there = [o for o in tree_leaves((args, kwargs or {})) if isinstance(o, torch.Tensor)]
            if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and not there[-1].is_cuda: self.sent += res.nbytes
            self.most = max(self.most, res.nbytes)
        return res

@pytest.mark.parametrize('gb,sent', [(75,1), (4,7)])
@pytest.mark.parametrize('own', [False,True])
def test_nearest_on_a_gpu(memory, own, gb, sent):
    "Nobody waits for it, and the bank is sent once; where it has no room, once for every block of queries"
    memory(gb)
    with FakeTensorMode(), Bytes() as b:
        x,q = torch.empty(200_000, 2048, dtype=torch.float16),torch.empty(28_000, 2048, dtype=torch.float16)
        if gb==4: x = torch.empty(1_280_000, 2048, dtype=torch.float16)
        sims,near = neighbors.nearest(x, q, 20, torch.arange(len(q)) if own else None, device='cuda')
        assert sims.shape==near.shape==(28_000,20) and sims.device.type=='cuda' and sims.dtype==torch.float32
        assert sent*x.nbytes<=b.sent<=sent*x.nbytes*(1 if gb==75 else 2)+1.1*q.nbytes and b.most<=max(16384**2*4, x.nbytes)
        if gb==75:
            b.sent = 0
            neighbors.nearest(x, x, 20, torch.arange(len(x)), device='cuda')
            assert b.sent<1.01*x.nbytes # queries and bank are one

@pytest.mark.parametrize('chunk', [7,100])
def test_halves(monkeypatch, chunk):
    "Rows of 16 bits are multiplied as they are, and their lengths taken out afterwards"
    torch.manual_seed(0)
    x,q = (torch.randn(n, 9).mul(5).half() for n in (50,11))
    set_ = []
    class Seen:
        def __setattr__(self, k, v): set_.append((k,v)); self.__dict__[k] = v
    seen = Seen(); seen.__dict__['fp32_precision'] = 'ieee'
    monkeypatch.setattr(torch.backends.cuda, 'matmul', seen)
    monkeypatch.setattr(neighbors, '_halves', lambda *args: True)
    sims,near = neighbors.nearest(x, q, 4, chunk=chunk)
    assert {v for _,v in set_}=={'tf32','ieee'} and seen.fp32_precision=='ieee'
    want = F.normalize(q.double())@F.normalize(x.double()).T
    torch.testing.assert_close(sims.double(), want.topk(4).values, atol=1e-6, rtol=0)
    assert torch.equal(near, want.topk(4).indices)

def test_what_tensor_cores_multiply_exactly():
    h,f = torch.zeros(1, dtype=torch.float16),torch.zeros(1)
    assert neighbors._halves(h, h, torch.device('cuda'))
    assert not any(neighbors._halves(*o) for o in ((h,f,torch.device('cuda')), (f,h,torch.device('cuda')), (h,h,torch.device('cpu'))))
