"""Sinkhorn, swapped loss and NT-Xent against plain forms, lightly and limits, as batch and number of prototypes grow. About three minutes.

All in float32 on the CPU, on inputs that are ready. Loss means value and gradient. The forms of a table agree in their results, which is checked.

- Sinkhorn: codes of a batch that is assigned together with a queue. Plain is the exponential form of the paper's pseudo-code. The limit reads all
  scores once a round and copies those of the batch.
- swapped loss: from scores and codes. Plain goes over pairs of views, as lightly does; the limit reads scores and codes once and writes the gradient.
- codes and swapped loss: Sinkhorn for two assigning views, then the loss, against lightly's `SwaVLoss`.
- NT-Xent: plain makes all similarities as one matrix. Its limit is one of memory, 1 GiB.
- ms: median of runs that take turns, `/ ours`: median ratio of neighbours, for one and for all threads.
- MiB: highest memory above the inputs, result included, each size in a process of its own.
"""
import json, math, sys

import torch
from torch.nn import functional as F

from measure import alone, paired, peak_memory, save

dim,eps,temp,rounds = 128,.05,.1,3

def unit(n): return F.normalize(torch.randn(n, dim), dim=1)

def grad_of(f, x): # the loss and its gradient
    loss = f(x)
    return loss.detach(),*torch.autograd.grad(loss, x)

# Each part: {name: a call without arguments} for one size, ours first

def sinkhorn(batch, queue, protos):
    from lightly.loss.swav_loss import sinkhorn as lightly
    from self_supervised.sinkhorn import sinkhorn_knopp
    c   = unit(protos)
    s,q = unit(batch)@c.T,unit(queue)@c.T
    def plain():
        m = (torch.cat([s,q])/eps).exp()
        for _ in range(rounds):
            m /= m.sum(0, keepdim=True)
            m /= m.sum(1, keepdim=True)
        return m[:batch]
    def limit():
        for _ in range(rounds): s.sum(), q.sum()
        return s.clone()
    return dict(ours=lambda: sinkhorn_knopp(s, eps, rounds, queue=q), limit=limit, plain=plain, lightly=lambda: lightly(torch.cat([s,q]), rounds, eps)[:batch])

def swapped(views, batch, protos):
    from self_supervised.vision.swav import swav_loss
    s = (.3*torch.randn(views, batch, protos)).requires_grad_()
    q = (5*torch.rand(2, batch, protos)).softmax(2)
    def pairs(s):
        s = s.unbind()
        return sum(-(q[a]*F.log_softmax(s[v]/temp, 1)).sum(1).mean() for a in (0,1) for v in range(views) if v!=a)/(2*(views-1))
    def limit():
        s.detach().sum(), q.sum()
        return torch.full_like(s, 1.)
    return dict(ours=lambda: grad_of(lambda s: swav_loss(s, q, [0,1], temp), s), limit=limit, plain=lambda: grad_of(pairs, s))

def swav(views, batch, queue, protos):
    from lightly.loss import SwaVLoss
    from self_supervised.sinkhorn import sinkhorn_knopp
    from self_supervised.vision.swav import swav_loss
    c  = unit(protos)
    s  = torch.stack([unit(batch)@c.T for _ in range(views)]).requires_grad_()
    q  = [unit(queue)@c.T for _ in range(2)] if queue else None
    lightly = SwaVLoss(temp, rounds, eps)
    def ours(s): return swav_loss(s, torch.stack([sinkhorn_knopp(s[a], eps, rounds, queue=q and q[a]) for a in (0,1)]), [0,1], temp)
    def theirs(s):
        s = s.unbind()
        return lightly(s[:2], s[2:], q).squeeze()
    return dict(ours=lambda: grad_of(ours, s), lightly=lambda: grad_of(theirs, s))

def nt_xent(embeddings):
    from lightly.loss import NTXentLoss
    from self_supervised.vision.simclr import nt_xent_loss
    z = torch.randn(embeddings, dim, requires_grad=True)
    lightly = NTXentLoss(temp)
    def plain(z):
        z,n = F.normalize(z, dim=1),len(z)
        s = (z@z.T/temp).masked_fill_(torch.eye(n, dtype=torch.bool), -math.inf)
        return F.cross_entropy(s, (torch.arange(n)+n//2)%n)
    return {nm: lambda f=f: grad_of(f, z) for nm,f in dict(ours=lambda z: nt_xent_loss(z, temp), plain=plain, lightly=lambda z: lightly(*z.chunk(2))).items()}

# part: what it is called, the columns of a size, a small size, sizes for time, sizes for memory
parts = {sinkhorn: ('Sinkhorn',               ('batch','queue','K'),         (8,8,9),   [(256,0,3000), (256,3840,300), (256,3840,3000), (4096,3840,3000), (4096,3840,6000)],
                                                                                        [(256,3840,3000), (4096,3840,3000), (4096,3840,6000)]),
         swapped:  ('swapped loss',           ('views','batch','K'),         (3,4,9),   [(2,256,3000), (8,32,3000), (8,256,300), (8,256,3000), (8,1024,3000)],
                                                                                        [(2,256,3000), (8,256,3000), (8,1024,3000)]),
         swav:     ('codes and swapped loss', ('views','batch','queue','K'), (3,4,8,9), [(8,32,0,3000), (8,256,0,3000), (8,256,3840,3000)], [(8,256,0,3000), (8,256,3840,3000)]),
         nt_xent:  ('NT-Xent',                ('embeddings',),               (8,),      [(512,), (2048,), (4096,)], [(8192,), (16384,)])}

def agree(part, size):
    ours,*others = (f() for nm,f in part(*size).items() if nm!='limit')
    for o in others: torch.testing.assert_close(o, ours, rtol=1e-3, atol=1e-6)

def times(part, cols, sizes, threads):
    "A row for each size"
    torch.set_num_threads(threads)
    for size in sizes:
        t,r = paired(part(*size), 5)
        yield dict(zip(cols, size)) | dict(threads=threads) | {'ours, ms': 1e3*t.pop('ours')} | {f'{nm} / ours': r[nm] for nm in t}

def peaks(part, cols, sizes):
    "A row for each size"
    for size in sizes:
        mem = {nm: o/2**20 for nm,o in alone(__file__, part.__name__, *size).items()}
        yield dict(zip(cols, size)) | {f'{nm}, MiB': o for nm,o in mem.items()} | ({'ours / 1 GiB': mem['ours']/2**10} if part is nt_xent else {})

if __name__=='__main__':
    if len(sys.argv)>1:
        part = globals()[sys.argv[1]]
        for f in part(*parts[part][2]).values(): f() # what a first call loads
        print(json.dumps({nm: peak_memory(f) for nm,f in part(*map(int, sys.argv[2:])).items()})); sys.exit()
    torch.manual_seed(0)
    tables,threads = {},sorted({1, torch.get_num_threads()})
    for part,(name,cols,small,for_time,for_memory) in parts.items():
        agree(part, small)
        tables[f'{name}, time']   = [row for n in threads for row in times(part, cols, for_time, n)]
        tables[f'{name}, memory'] = list(peaks(part, cols, for_memory))
    save('loss', __doc__.partition('\n\n')[2], tables, ['lightly'])
