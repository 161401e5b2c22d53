"""DSpark oracle (NumPy, fp64): the draft module of V4-Flash-0731 and V4-Pro-0813 on the tiny model of numpy_oracle.py.

Own code, written from the specification. Full-sequence and cache-free like numpy_oracle.py, so it is also the truth for any
cached, paged or ring-buffered implementation. Notation: p = position of the last token the target has processed,
a = the token chosen from the target's logits at p (it will sit at p+1). Draft token i is meant for position p+2+i.
"""
import numpy as np
from oracle import numpy_oracle as o
from oracle.numpy_oracle import W, D, H, C, G, OL, V, WIN, rms, lin, rope, softmax, sig

BLOCK, NOISE, RANK, STAGES, TARGETS = 5, V-1, 8, 3, (2, 3, 4)
MTP = [f'mtp.{s}.' for s in range(STAGES)]

def shapes():                               # official names; only mtp.0 has main_*, only the last stage has heads
    base = {n[6:]: s for n, s in o.shapes().items() if n.startswith('mtp.0.')}
    for n in list(base):
        if n.startswith(('e_proj', 'h_proj', 'enorm', 'hnorm', 'norm', 'hc_head')): del base[n]
    s = {p+n: v for p in MTP for n, v in base.items()}
    L = MTP[-1]
    s.update({'mtp.0.main_proj.weight': (D, D*len(TARGETS)), 'mtp.0.main_norm.weight': (D,), L+'norm.weight': (D,),
              L+'hc_head_fn': (4, 4*D), L+'hc_head_base': (4,), L+'hc_head_scale': (1,),
              L+'markov_head.markov_w1.weight': (V, RANK), L+'markov_head.markov_w2.weight': (V, RANK),
              L+'confidence_head.proj.weight': (1, D+RANK)})
    return s
W.update({n: o.make(n, s)/(8 if 'confidence' in n else 1) for n, s in shapes().items()})   # /8: away from 0 and 1

# ---- target side --------------------------------------------------------
def target(ids):
    """Logits [S, V] and taps [S, 3D]: plain mean of the four streams AFTER each target layer, concatenated."""
    ids = np.asarray(ids); X = np.repeat(W['embed.weight'][ids][:, None], 4, 1); taps = []
    for l in range(5):
        X = o.block(X, f'layers.{l}.', o.RATIOS[l], ids, l < o.NHASH)
        if l in TARGETS: taps.append(X.mean(1))
    return o.head(X, '', 'norm.weight'), np.concatenate(taps, -1)

def main_x(taps):                           # one vector per position, shared by all stages
    return rms(lin(taps, 'mtp.0.main_proj.weight'), W['mtp.0.main_norm.weight'])

def keys(x, p, pos):                        # key = value row; the same weights serve context and block rows
    return o.sim_kv(rope(rms(lin(x, p+'wkv.weight'), W[p+'kv_norm.weight']), pos, o.freqs(False)))

def context(taps, shift=0):                 # per stage [S, C]; no attn_norm and no hyper-connection on this path
    m = main_x(taps); t = np.arange(len(m)) + shift
    return [keys(m, p+'attn.', t) for p in MTP]

# ---- draft block --------------------------------------------------------
def draft_attention(x, p, ctx, pos):
    """All rows see all of ctx and all rows of the block (no mask at all)."""
    f, n = o.freqs(False), len(x)           # theta 10,000 without YaRN
    q = lin(rms(lin(x, p+'wq_a.weight'), W[p+'q_norm.weight']), p+'wq_b.weight').reshape(n, H, C)
    k = np.concatenate([ctx, keys(x, p, pos)])
    z = np.einsum('bhd,kd->bhk', rope(rms(q), pos, f), k)*C**-.5
    z = np.concatenate([z, np.broadcast_to(W[p+'attn_sink'][None, :, None], (n, H, 1))], -1)
    out = rope(np.einsum('bhk,kd->bhd', softmax(z, -1)[..., :-1], k), pos, f, -1).reshape(n, G, -1)
    u = np.einsum('bgd,grd->bgr', out, W[p+'wo_a.weight'].reshape(G, OL, -1)).reshape(n, -1)
    return lin(u, p+'wo_b.weight')

def stage(X, p, ctx, pos):
    X = o.site(X, p+'hc_attn_', lambda x: draft_attention(rms(x, W[p+'attn_norm.weight']), p+'attn.', ctx, pos))
    return o.site(X, p+'hc_ffn_', lambda x: o.moe(rms(x, W[p+'ffn_norm.weight']), p+'ffn.', None, False))

def collapse(X, p):                         # hc_head: sigmoid weights, no Sinkhorn
    v = X.reshape(len(X), -1); m = (v @ W[p+'hc_head_fn'].T)/np.sqrt((v*v).mean(-1, keepdims=True)+o.EPS)
    return ((sig(m*W[p+'hc_head_scale']+W[p+'hc_head_base'])+o.EPS)[..., None]*X).sum(1)

def draft_hidden(ctx, p, a, n=BLOCK, shift=0, trace=None):
    """ctx: context(...) for positions 0..p at least. Returns x [n, D] before the norm and base logits [n, V]."""
    ids = np.array([a] + [NOISE]*(n-1)); pos = p + 1 + np.arange(n) + shift
    X = np.repeat(W['embed.weight'][ids][:, None], 4, 1)
    for s, m in enumerate(MTP):
        X = stage(X, m, ctx[s][max(p+1-WIN, 0):p+1], pos)       # last min(128, p+1) rows, p included
        if trace is not None: trace.append(X)
    x = collapse(X, MTP[-1])
    return x, rms(x, W[MTP[-1]+'norm.weight']) @ W['head.weight'].T

# ---- sampling -----------------------------------------------------------
def dist(logits, temp=0., top_p=1.):
    """Distribution a token is drawn from; temp 0 = one-hot at the lowest index of the maximum."""
    if temp == 0: return np.eye(V)[logits.argmax(-1)]
    q = softmax(logits/temp, -1); order = np.argsort(-q, -1, kind='stable')
    s = np.take_along_axis(q, order, -1); keep = np.cumsum(s, -1) - s < top_p       # mass before the token
    q = np.where(np.take_along_axis(keep, np.argsort(order, -1, kind='stable'), -1), q, 0)
    return q/q.sum(-1, keepdims=True)
def pick(q, u):                             # inverse CDF in id order: first id whose cumulated mass exceeds u
    return int(min((np.cumsum(q) <= u*q.sum()).sum(), np.flatnonzero(q)[-1]))

def markov(x, L, a, temp=0., top_p=1., u=None):
    """Serial pass. Returns tokens [n], corrected logits [n, V], distributions [n, V], raw confidence logits [n]."""
    m = MTP[-1]; w1, w2 = W[m+'markov_head.markov_w1.weight'], W[m+'markov_head.markov_w2.weight']
    t, Z, Q, c = [], [], [], []
    for i in range(len(L)):
        e = w1[t[-1] if t else a]           # embedding of the PREVIOUS token; the first is a itself
        Z.append(L[i] + w2 @ e); Q.append(dist(Z[i], temp, top_p)); t.append(pick(Q[i], 0. if u is None else u[i]))
        c.append((W[m+'confidence_head.proj.weight'] @ np.concatenate([x[i], e]))[0])    # x before the norm
    return t, np.array(Z), np.array(Q), np.array(c)
def confidence(c, tau=1.):                  # conditional acceptance estimates and survival of each prefix
    s = sig(c/tau); return s, np.cumprod(s)

def draft(ctx, p, a, n=BLOCK, temp=0., top_p=1., u=None):
    return markov(*draft_hidden(ctx, p, a, n), a, temp, top_p, u)

# ---- verification -------------------------------------------------------
def verify_greedy(t, L):
    """t: k drafts; L: target logits [k+1, V] of the rows [a, t_0 .. t_{k-1}]. Accepted count and the next token."""
    y = L.argmax(-1); n = 0
    while n < len(t) and t[n] == y[n]: n += 1
    return n, int(y[n])
def residual(p, q):
    r = np.maximum(p-q, 0); return r/r.sum() if r.sum() > 0 else p
def verify_sample(t, Q, P, u, u_last):
    """Q, P: draft / target distributions [k, V] / [k+1, V] after temperature and top-p; u [k], u_last in [0, 1)."""
    for i, x in enumerate(t):
        if u[i]*Q[i, x] >= P[i, x]: return i, pick(residual(P[i], Q[i]), u_last)
    return len(t), pick(P[len(t)], u_last)

def spec_greedy(prompt, new, propose):
    """Speculative loop; propose(taps, p, a) -> drafts. Returns new tokens and accepted counts."""
    ids = list(prompt); L, taps = target(ids); ids.append(int(L[-1].argmax())); acc = []
    while len(ids) < len(prompt)+new:
        t = list(propose(taps, len(ids)-2, ids[-1])); L, taps = target(ids+t)
        n, y = verify_greedy(t, L[len(ids)-1:]); ids += t[:n]+[y]; acc.append(n)
        taps = taps[:len(ids)-1]            # rows of rejected drafts are dropped
    return ids[len(prompt):len(prompt)+new], acc

def ring_ok(R, k=BLOCK, steps=400):
    """Shared ring of R slots per stage: verify writes context rows p+1..p+k+1 (rejected ones too), then the next
    draft writes its rows at p+1..p+BLOCK and reads p-WIN+1..p+BLOCK. True if no read meets a foreign row."""
    rng = np.random.RandomState(1); slot = np.full(R, -1); p = 300
    for q in range(p+1): slot[q % R] = q
    for _ in range(steps):
        for q in range(p+1, p+k+2): slot[q % R] = q
        p += 1 + rng.randint(k+1)
        for q in range(p+1, p+BLOCK+1): slot[q % R] = q + 10**6         # marked as a draft row of this step
        if any(slot[q % R] != q + (10**6)*(q > p) for q in range(p-WIN+1, p+BLOCK+1)): return False
        for q in range(p+1, p+BLOCK+1): slot[q % R] -= 10**6 - 10**7    # stale from now on
    return True

def main():
    t = np.arange(200); ids = (t*37 + (t*t)//3) % V
    U = np.modf(0.6180339887498949*np.arange(1, 64))[0]                 # the "given" uniform numbers
    r = lambda v: ' '.join('%.6f' % y for y in np.ravel(v))
    print('weights', len(shapes()), sum(int(np.prod(s)) for s in shapes().values()),
          r(W['mtp.0.main_proj.weight'][0, :2]), r(W['mtp.2.markov_head.markov_w1.weight'][0, :2]))
    for o.QAT in (False, True):
        L, taps = target(ids); ctx = context(taps); tag = 'QAT' if o.QAT else 'plain'; margin = 9.
        print('==', tag, 'tap[199]', r(np.linalg.norm(taps[199])), r(taps[199, [0, D, 2*D]]), '| main_x', r(main_x(taps)[199, :3]))
        for p in (0, 4, 127, 128, 150, 199):
            a, tr = int(L[p].argmax()), []
            x, B = draft_hidden(ctx, p, a, trace=tr); tok, Z, _, c = markov(x, B, a); s, surv = confidence(c)
            margin = min(margin, np.diff(np.sort(Z, -1)[:, -2:]).min())
            print('p', p, 'a', a, 'tokens', tok, 'without markov', B.argmax(-1).tolist())
            print('  confidence logits', r(c), '| sigmoid', r(s), '| survival', r(surv[-1]))
            if p not in (4, 199): continue
            for k in range(STAGES):
                print('  stage', k, 'key[p]', r(ctx[k][p, [0, 1, -2, -1]]), '| out', r(np.linalg.norm(tr[k])), r(tr[k][0, 0, :2]), r(tr[k][4, 3, :2]))
            print('  x', r(np.linalg.norm(x)), r(x[0, :2]), r(x[4, :2]), '| base', r(np.linalg.norm(B)), r(B[0, :2]), r(B[4, :2]),
                  '| corrected', r(Z[0, :2]), r(Z[4, :2]))
        print('smallest top-2 margin of corrected logits', r(margin))
        p, a = 199, int(L[199].argmax())
        tk, _, Q, _ = draft(ctx, p, a, temp=1., top_p=.95, u=U[:5])
        P = dist(target(list(ids)+[a]+tk)[0][p+1:], 1., .95)
        print('sampled (temp 1, top_p .95, u[0:5])', tk, 'q', r([Q[i, x] for i, x in enumerate(tk)]), 'p', r([P[i, x] for i, x in enumerate(tk)]))
        M = np.concatenate([.5*Q+.5*P[:5], P[5:]])                      # a target closer to the draft
        print('verify p', verify_sample(tk, Q, P, U[5:10], U[10]), 'closer p', [verify_sample(tk, Q, M, U[j:j+5], U[j+5]) for j in range(5, 45, 5)],
              'u = 0', verify_sample(tk, Q, M, 0*U[:5], U[10]))
        assert max(abs(np.minimum(P[i], Q[i]) + (1-np.minimum(P[i], Q[i]).sum())*residual(P[i], Q[i]) - P[i]).max() for i in range(5)) < 1e-12
        y = draft_hidden(context(taps, 1), p, a, shift=1)[1]            # only relative positions matter
        if not o.QAT: assert abs(y - draft_hidden(ctx, p, a)[1]).max() < 1e-11
    o.QAT = False; print('== 7 rows instead of 5 at p 199', draft(context(target(ids)[1]), 199, int(L[199].argmax()), 7)[0])
    ids, new, count = list(ids[:160]), 22, [0]; full = list(ids)
    for _ in range(new): full.append(int(target(full)[0][-1].argmax()))
    truth = full[len(ids):]
    def cheat(taps, p, a):                  # the true continuation, wrong at a moving place: 1, 2, 3, 4, 5, 0 accepted
        count[0] += 1; j = p - len(ids) + 2
        return [(x + (i == count[0] % (BLOCK+1))) % V for i, x in enumerate((truth + [0]*9)[j:j+BLOCK])]
    for name, n, f in (('dspark', 8, lambda taps, p, a: draft(context(taps), p, a)[0]), ('cheat', new, cheat)):
        got, acc = spec_greedy(ids, n, f); assert got == truth[:n], (name, got, truth)
        print('speculative greedy = plain greedy,', name, got, 'accepted', acc)
    assert ring_ok(WIN+BLOCK) and not ring_ok(WIN+BLOCK-1)
    print('ring: %d slots suffice, %d do not' % (WIN+BLOCK, WIN+BLOCK-1))

if __name__ == '__main__': main()
