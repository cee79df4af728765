"Slow, independent implementations of the definitions, in float64 and with explicit loops"
import math
import numpy as np


def sinkhorn(scores, eps=.05, n_iters=3):
    "Codes of `scores` (B,K): prototypes to equal mass first, samples last, on exp(S/eps) in extended precision"
    B,K = len(scores),len(scores[0])
    m = np.asarray(scores, dtype=np.longdouble)/np.longdouble(eps)
    m -= m.max()
    q = np.exp(m)
    for _ in range(n_iters):
        for k in range(K):
            mass = sum(q[b,k] for b in range(B))
            for b in range(B): q[b,k] /= mass*K
        for b in range(B):
            mass = sum(q[b,k] for k in range(K))
            for k in range(K): q[b,k] /= mass*B
    for b in range(B):
        mass = sum(q[b,k] for k in range(K))
        for k in range(K): q[b,k] /= mass
    return q.astype(np.float64)


def log_softmax(s): # of one row
    top = max(s)
    lse = top + math.log(sum(math.exp(o-top) for o in s))
    return [o-lse for o in s]


def swapped_loss(scores, codes, ids, temp):
    "`scores` (V,B,K), `codes` (A,B,K): the sum over pairs of different views, written out"
    V,B,K = len(scores),len(scores[0]),len(scores[0][0])
    total = 0.
    for q,a in zip(codes, ids):
        for v in range(V):
            if v==a: continue
            for b in range(B):
                logp = log_softmax([float(o)/temp for o in scores[v][b]])
                total += -sum(float(q[b][k])*logp[k] for k in range(K))/B/(V-1)/len(ids)
    return total


class Queue:
    "The last `length` rows of each assigning view, as Python lists, newest batch first"
    def __init__(self, n_views, length): self.rows,self.length = [[] for _ in range(n_views)],length
    def full(self): return all(len(o)==self.length for o in self.rows)
    def push(self, z): # (A,B,D)
        for rows,new in zip(self.rows, z): rows[:] = ([list(map(float, o)) for o in new] + rows)[:self.length]


def codes(z, scores, ids, prototypes, queue=None, use_queue=False, eps=.05, n_iters=3):
    "Codes (A,B,K) of the assigning views from numpy arrays z (V,B,D), scores (V,B,K), prototypes (K,D)"
    B,res = scores.shape[1],[]
    for i,a in enumerate(ids):
        s = [list(o) for o in scores[a]]
        if use_queue: s += [[float(np.dot(o, c)) for c in prototypes] for o in queue.rows[i]]
        res.append(sinkhorn(s, eps, n_iters)[:B])
    return np.stack(res)


def nt_xent(z, n_views, temp):
    "`z` (V·B,D), view by view: every view is an anchor; each positive against all views of other images, written out"
    z = np.asarray(z, dtype=np.float64)
    n,B = len(z),len(z)//n_views
    sim = lambda i,j: float(np.dot(z[i], z[j]))/math.sqrt(np.dot(z[i], z[i])*np.dot(z[j], z[j]))/temp
    total,pairs = 0.,0
    for i in range(n):
        for p in range(n):
            if p==i or p%B!=i%B: continue
            logits = [sim(i,p)] + [sim(i,j) for j in range(n) if j%B!=i%B]
            total -= log_softmax(logits)[0]
            pairs += 1
    return total/pairs


def spherical_kmeans(x, start, n_iters):
    "Centroids and labels of rows `x`: the nearest by scalar product; the mean of its rows, of unit length; one without rows stays"
    dot = lambda a,b: sum(float(i)*float(j) for i,j in zip(a, b))
    nearest = lambda row: max(range(len(centroids)), key=lambda k: dot(row, centroids[k]))
    centroids = [[float(o) for o in c] for c in start]
    for _ in range(n_iters):
        labels = [nearest(o) for o in x]
        for k in range(len(centroids)):
            mine = [o for o,l in zip(x, labels) if l==k]
            if not mine: continue
            mean = [sum(float(o[d]) for o in mine)/len(mine) for d in range(len(mine[0]))]
            centroids[k] = [o/math.sqrt(dot(mean, mean)) for o in mean]
    return np.array(centroids),np.array([nearest(o) for o in x])


def balanced_labels(scores, eps, rounds):
    "The largest part of each row's code, after `rounds` rounds over all of `scores` (N,K)"
    return sinkhorn(scores, eps, rounds).argmax(1)


def cluster_loss(scores, labels, temp):
    "`scores` (V,B,H,K), `labels` (H,B): how unlikely every view of every image finds its image's label, in every head"
    V,B,H = len(scores),len(scores[0]),len(labels)
    total = 0.
    for v in range(V):
        for b in range(B):
            for h in range(H): total -= log_softmax([float(o)/temp for o in scores[v][b][h]])[int(labels[h][b])]
    return total/(V*B*H)
