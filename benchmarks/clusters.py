"""The two ways to label all images of ImageNet at once: k-means, and balance. About a quarter of an hour; `--n 20000` is a try.

Everything in float32 on the CPU, on projections that are ready, with K = 3000 and D = 128. Bunches: 1,000 groups around random directions, their
sizes as 1, 1/2, 1/3, …, prototypes from three rounds of k-means on a tenth of them. Noise: projections and prototypes without any structure.

- k-means: `spherical_kmeans`; a round is one search and one update, and one more search ends it. FAISS is the same with `faiss=True`, `faiss.Kmeans`
  is FAISS's own k-means, told to use all images. The limit is the matrix products of the searches alone, block by block.
- Sinkhorn: `sinkhorn_labels`; a round is one pass over all images, and two more passes begin and end it. The limit is the products of the passes.
  Dense keeps the exponentials of all scores, which for all images are 14.4 GB, so that a round is two products with a vector; it is run on few.
- s: median of runs that take turns, one for all images and three else, after one that does not count; `/ ours`: median ratio of
  neighbours.
- MiB: highest memory above the inputs, result included, each part and size in a process of its own, with one thread.
- rounds of Sinkhorn: until no prototype's mass is further from its share than a tenth, or than a hundredth; the residual is that distance after the
  last round, of a thousand at most. Labels: images of the rarest and of the commonest label, as a part of the share.
- load: cores that other processes of the machine used meanwhile. 0 would be an idle machine; beside others two threads gain little or lose.
"""
import json, time
from unittest.mock import patch

import faiss, psutil, torch
from fastcore.script import call_parse
from torch.nn import functional as F

from measure import alone, paired, peak_memory, save
from self_supervised import sinkhorn
from self_supervised.vision.deepcluster import spherical_kmeans

K,dim = 3000,128

def unit(n): return F.normalize(torch.randn(n, dim), dim=1)

def noise(n): return unit(n),unit(K)

def bunches(n, groups=1000):
    of = torch.multinomial(1/torch.arange(1., groups+1), n, replacement=True)
    z  = F.normalize(unit(groups)[of].add_(torch.randn(n, dim), alpha=dim**-.5), dim=1)
    some = z[:max(n//10, K)]
    return z,spherical_kmeans(some, some[:K], 3)[0]

def products(z, c, times):
    rows = 2**20//K
    res  = z.new_empty(rows, K)
    for _ in range(times):
        for o in z.split(rows): torch.mm(o, c.T, out=res[:len(o)])

# Each part: {name: a call without arguments} for n images, ours first

def kmeans(n, rounds):
    z,_ = bunches(n)
    def peer():
        km = faiss.Kmeans(dim, K, niter=rounds, spherical=True, min_points_per_centroid=1, max_points_per_centroid=n)
        km.train(z.numpy(), init_centroids=z[:K].numpy())
        return torch.from_numpy(km.assign(z.numpy())[1])
    return {'ours':         lambda: spherical_kmeans(z, z[:K], rounds)[1],
            'FAISS':        lambda: spherical_kmeans(z, z[:K], rounds, faiss=True)[1],
            'faiss.Kmeans': peer,
            'limit':        lambda: products(z, z[:K], rounds+1)}

def balance(n, rounds, eps=.05):
    z,c = bunches(n)
    def dense():
        e = (z@c.T).div_(eps).exp_()
        w = 1/e.sum(0)
        for _ in range(rounds-1): w = 1/((1/(e@w))@e)
        return e.mul_(w).max(1).indices
    forms = {'ours': lambda: sinkhorn.sinkhorn_labels(z, c, eps, 0, rounds)[0], 'limit': lambda: products(z, c, rounds+2)}
    return forms if n*K>2**30 else forms | {'dense': dense}

parts   = {'k-means':kmeans, 'Sinkhorn':balance}
columns = {'k-means':('FAISS','faiss.Kmeans','limit'), 'Sinkhorn':('dense','limit')}

def agree(forms):
    ours,*others = (f() for nm,f in forms.items() if nm!='limit')
    for o in others: assert (ours==o).float().mean()>.999

def set_threads(n):
    torch.set_num_threads(n)
    faiss.omp_set_num_threads(n)

def loaded(f):
    "What `f` gives, and the cores that other processes used meanwhile"
    def now(): return time.perf_counter(),sum(psutil.cpu_times()[:3])-sum(psutil.Process().cpu_times()[:2])
    t,c = now()
    res = f()
    t2,c2 = now()
    return res,{'load': (c2-c)/(t2-t)}

def times(part, n, rounds, threads, turns=3):
    set_threads(threads)
    (t,r),load = loaded(lambda: paired(parts[part](n, rounds), turns))
    row = dict(images=n, rounds=rounds, threads=threads) | {'ours, s': t.pop('ours')}
    return row | {f'{nm} / ours': r.get(nm, '–') for nm in columns[part]} | load

def peaks(part, n, rounds):
    mem = alone(__file__, '--part', part, '--n', n, '--rounds', rounds)
    return dict(images=n, rounds=rounds) | {f'{nm}, MiB': mem[nm]/2**20 if nm in mem else '–' for nm in ('ours', *columns[part])}

def convergence(data, n, eps, tol=.01, at_most=1000):
    "How many rounds of Sinkhorn it takes"
    off,mass = [],sinkhorn._mass
    def spied(blocks):
        res = mass(blocks)
        off.append((res/res.mean()-1).abs().max().item())
        return res
    with patch.object(sinkhorn, '_mass', spied): labels,_ = sinkhorn.sinkhorn_labels(*data(n), eps, tol, at_most)
    def until(tol): return next((i for i,o in enumerate(off, 1) if o<=tol), f'> {len(off)}')
    counts = labels.bincount(minlength=K)*K/n
    return {'data':data.__name__, 'images':n, 'eps':eps, 'rounds to 0.1':until(.1), 'rounds to 0.01':until(tol), 'residual':off[-1],
            'rarest label':counts.min().item(), 'commonest label':counts.max().item()}

@call_parse
def main(
    n:int=1_200_000, # images, as many as ImageNet has
    part:str='', # used by the benchmark itself: the part that this process runs alone
    rounds:int=1, # and its rounds
):
    "Measure and write the tables to results/"
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    set_threads(1)
    if part:
        agree(parts[part](2*K, rounds)) # and what a first call loads
        print(json.dumps({nm: peak_memory(f) for nm,f in parts[part](n, rounds).items()}))
        return
    few = n//20
    tables = {'k-means, memory':  [peaks('k-means', n, 1)],
              'Sinkhorn, memory': [peaks('Sinkhorn', n, 1), peaks('Sinkhorn', few, 1)],
              'k-means, time':    [times('k-means', n, 1, 1, 1), *(times('k-means', few, 1, t) for t in sorted({1, threads}))],
              'Sinkhorn, time':   [times('Sinkhorn', n, 1, 1, 1), times('Sinkhorn', few, 10, 1)]}
    set_threads(1)
    tables['rounds of Sinkhorn'] = [convergence(d, m, eps) for d in (noise, bunches) for m,eps in ((2*few,.05), (few,.05), (few,.02), (few,.01))]
    save('clusters', __doc__.partition('\n\n')[2].strip(), tables, ['faiss-cpu'])
