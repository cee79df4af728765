"""The two ways to label all images of ImageNet at once, by k-means and by balance. About half an hour; `--n 20000` is a try.

Everything in float32 on the CPU, on projections that are ready. Bunches: 1,000 groups around random directions, their sizes as 1, 1/2, 1/3, …,
prototypes from three rounds of k-means on a tenth of them. Noise: projections and prototypes without any structure.

- k-means: two searches and one update, that is `spherical_kmeans(n_iters=1)`. FAISS is the same with `faiss=True`, `faiss.Kmeans` is FAISS's own
  k-means, set to use all images. The limit is the two matrix products alone, block by block.
- Sinkhorn: `sinkhorn_labels(n_iters=1)`, which passes over all images three times; a further round is one more. The limit is the three products.
  Dense keeps the exponentials of all scores, so that a round is two products with a vector; at full size they are 14.4 GB, so it is run on a tenth.
  It works as long as 1/eps is far from overflow.
- rounds: until no prototype's mass is further from its share than a tenth, or `tol`, a hundredth; 200 at most. The residual is the distance at the end.
- s: median of runs that take turns, `/ ours`: median ratio of neighbours. CPU load: other processes of this machine, in cores, during the table.
- MiB: highest memory above the inputs, result included, each part in a process of its own, with one thread.
"""
import json, os, time
from contextlib import contextmanager
from unittest.mock import patch

import faiss, psutil, torch
from fastcore.script import call_parse
from torch.nn import functional as F

from measure import alone, paired, peak_memory, save, seconds
from self_supervised import sinkhorn
from self_supervised.vision.deepcluster import spherical_kmeans

K,dim,tol = 3000,128,.01

def unit(n): return F.normalize(torch.randn(n, dim), dim=1)

def noise(n): return unit(n),unit(K)

def bunches(n, groups=1000):
    of = torch.multinomial(1/torch.arange(1., groups+1), n, replacement=True)
    z  = F.normalize(unit(groups)[of].add_(torch.randn(n, dim), alpha=dim**-.5), dim=1)
    some = z[:max(n//10, K)]
    return z,spherical_kmeans(some, some[:K], 3)[0]

# Each part: {name: a call without arguments} for n images, ours first

def products(z, c, times):
    "What any search of this kind has to do, and nothing else"
    rows = 2**20//K
    res  = z.new_empty(rows, K)
    for _ in range(times):
        for o in z.split(rows): torch.mm(o, c.T, out=res[:len(o)])

def kmeans(n):
    z,_ = bunches(n)
    def peer():
        km = faiss.Kmeans(dim, K, niter=1, spherical=True, min_points_per_centroid=1, max_points_per_centroid=n)
        km.train(z.numpy(), init_centroids=z[:K].numpy())
        return torch.from_numpy(km.assign(z.numpy())[1])
    return {'ours':         lambda: spherical_kmeans(z, z[:K], 1)[1],
            'FAISS':        lambda: spherical_kmeans(z, z[:K], 1, faiss=True)[1],
            'faiss.Kmeans': peer,
            'limit':        lambda: products(z, z[:K], 2)}

def balance(n, eps=.05):
    z,c = bunches(n)
    def dense():
        e = (z@c.T).div_(eps).exp_()
        w = 1/e.sum(0)
        for _ in range(2): w = w/((1/(e@w))@e)
        return e.mul_(w).max(1).indices
    forms = {'ours': lambda: sinkhorn.sinkhorn_labels(z, c, eps, 0, 2)[0], 'limit': lambda: products(z, c, 4)}
    return forms if n*K>2**30 else forms | {'dense': dense}

parts = {'k-means':kmeans, 'Sinkhorn':balance}

def agree(forms):
    ours,*others = (f() for nm,f in forms.items() if nm!='limit')
    for o in others: assert (ours==o).float().mean()>.999

@contextmanager
def others(row):
    "Adds the cores that other processes used meanwhile to `row`"
    def cpu(): return sum(psutil.cpu_times()[:3])-sum(psutil.Process().cpu_times()[:2])
    c,t = cpu(),time.perf_counter()
    yield
    row['CPU load'] = (cpu()-c)/(time.perf_counter()-t)
