"""Pretrain a small encoder on images without labels, then ask what it has learned.

Run with `make demo`: about four minutes on two cores. Prints a table and writes pictures and the encoder to demo/.
"""
import shutil, subprocess, sys, time, warnings
from pathlib import Path
warnings.filterwarnings('ignore', category=FutureWarning)      # of libraries that import torch.jit
warnings.filterwarnings('ignore', category=DeprecationWarning) # of matplotlib, about fastai's image type

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from fastai.vision.all import *
from sklearn.manifold import TSNE
from torchvision.utils import make_grid

from self_supervised.all import *

out    = Path('demo')
epochs = 18  # of pretraining
protos = 100 # ten times the classes

class Block(Module):
    "Two convolutions and a shortcut, at half the resolution"
    def __init__(self, ni, nf):
        self.convs = nn.Sequential(ConvLayer(ni, nf, stride=2), ConvLayer(nf, nf, act_cls=None))
        self.short = ConvLayer(ni, nf, ks=1, stride=2, act_cls=None)
    def forward(self, x): return F.relu(self.convs(x) + self.short(x))

def small_encoder():
    "A small ResNet, 28×28×1 → 128 features"
    body = ConvLayer(1, 16),*(Block(i, o) for i,o in ((16,32),(32,64),(64,128)))
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(memory_format=torch.channels_last)

def view_pipelines():
    "Two views of 28 pixels and four of 14: multi-crop in small, and gentler than on photographs"
    return get_swav_aug_pipelines(num_crops=(2,4), crop_sizes=(28,14), min_scales=(.4,.1), max_scales=(1.,.4),
                                  jitter_s=.5, bw=False, blur=False, stats=None)

def pretrain(train, test):
    "The main job: a Learner, images without labels, and the callback. Labels only serve to watch; if the demo is killed, the next one goes on from its last epoch"
    model = create_swav_model(small_encoder(), hidden_size=256, projection_size=128, n_protos=protos)
    watch = OnlineKNN(tensor_dls(train, test, bs=500), every=3)
    learn = Learner(tensor_dls(train[0], test[0], bs=128), model,
                    cbs=[SWAV(view_pipelines(), crop_assgn_ids=[0,1], K=None), watch, CollapseMonitor(), Checkpoint(out/'checkpoints', epochs=1)])
    learn.resume(missing_ok=True)
    learn.fit_one_cycle(epochs, 8e-3)
    return learn

def from_scratch(train, test, epochs):
    "The same network and a linear layer, trained on labels: accuracy and encoder"
    dls = tensor_dls(train, bs=min(128, len(train[0])//2), after_batch=[IntToFloatTensor()])
    learn = Learner(dls, nn.Sequential(small_encoder(), nn.Linear(128,10)), loss_func=CrossEntropyLossFlat())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 3e-3)
    logits,_ = extract_features(learn.model, tensor_dls(test, bs=500, drop_last=False).train)
    return (logits.argmax(1)==test[1]).float().mean().item(), learn.model[0]

def judge_from_scratch(train, test):
    "What the labels alone give, in the place of the same questions"
    few = [from_scratch(sample_per_class(train, 10, seed=i), test, 50)[0] for i in range(5)]
    acc,encoder = from_scratch(train, test, 8)
    return [knn(encoder, tensor_dls(train, test, bs=500)), Result('linear, 10 labels a class', few), Result('linear, all labels', [acc])]

def save(fig, nm):
    fig.savefig(out/nm, dpi=110)
    plt.close(fig)

def plot_views(learn):
    axes = learn.swav.show(n=5, figsize=(7.5,6), layout='constrained')
    for i,ax in enumerate(axes[:6]): ax.set_title('large (assigned)' if i<2 else 'small', fontsize=8)
    axes[0].figure.suptitle('Views of five images, one image a row')
    save(axes[0].figure, 'views.png')

def plot_loss(learn):
    fig,ax = plt.subplots(figsize=(6,3.5), layout='constrained')
    losses,n = learn.recorder.losses,len(learn.dls.train)
    ax.plot(np.arange(len(losses))/n, losses, label='training, smoothed')
    ax.plot(range(1, epochs+1), [o[1] for o in learn.recorder.values], '.', label='held-out images')
    ax.axhline(np.log(protos), c='gray', ls='--', label=f'ln K = {np.log(protos):.2f}: nothing learned')
    ax.set(title='Swapped-prediction loss', xlabel='epoch', ylabel='loss'); ax.legend()
    save(fig, 'loss.png')

def plot_monitor(learn): save(learn.collapse_monitor.plot()[0].figure, 'monitor.png')

def plot_prototypes(learn, dl):
    axes = show_prototypes(learn, dl)
    axes[0].figure.suptitle('Nearest images to eight prototypes, found without labels', fontsize=10)
    save(axes[0].figure, 'prototypes.png')

def plot_features(learn, dl):
    ax, = plot_map(learn, dl, method='tsne', figsize=(7.5,5.5))
    ax.set_title('Test images by their SwAV features (t-SNE); the colours are labels the encoder never saw', fontsize=10)
    save(ax.figure, 'map.png')

def sheet(x, nrow): return make_grid(F.pad(x, [(28-x.shape[-1])//2]*4, value=1), nrow, padding=2, pad_value=1)[0]

def plot_overview(learn, x, dl):
    "The picture of the home page: images `x`, their views, and a map of those of `dl`, in the colours of labels that the encoder never saw"
    fig,axes = plt.subplots(1, 3, figsize=(8.1,2.25), width_ratios=(152,192,280), layout='constrained')
    x = x.float()/255
    axes[0].imshow(sheet(x[:25], 5), cmap='gray', vmin=0, vmax=1)
    axes[1].imshow(torch.cat([sheet(o, 1) for o in make_views(view_pipelines(), x[:25:5])], 1), cmap='gray', vmin=0, vmax=1)
    feats,y = extract_features(learn, dl)
    xy = TSNE(init='pca', random_state=0).fit_transform(F.normalize(feats, dim=1))
    xy,kept,half = (xy-xy.min(0))/np.ptp(xy, axis=0),[],np.array((.022,.05))
    for i,p in enumerate(xy): # silhouettes, of which each has room
        if any((abs(p-xy[j])<1.4*half).all() for j in kept): continue
        kept.append(i)
        im = np.asarray(dl.dataset[i][0]).squeeze()/255
        (l,b),(r,t) = p-half,p+half
        axes[2].imshow(np.dstack([np.broadcast_to(plt.get_cmap('tab10')(int(y[i]))[:3], (*im.shape,3)), im**.5]), extent=(l,r,b,t), aspect='auto')
    axes[2].set(xlim=(-.03,1.03), ylim=(-.06,1.06))
    for ax,title in zip(axes, ('images without labels', 'views of each belong together', 'what the model makes of them')):
        ax.set_title(title, fontsize=10)
        ax.axis('off')
    save(fig, 'overview.png')

def features_of_saved_encoder():
    "In a fresh process: load the encoder and write its test features"
    encoder = load_encoder(out/'encoder.safetensors', small_encoder())
    torch.save(extract_features(encoder, tensor_dls(*fashion_mnist(), bs=500).valid)[0], out/'features.pth')

def main():
    start = time.time()
    out.mkdir(exist_ok=True)
    set_seed(42)
    train,test = fashion_mnist()
    print(f'{len(train[0])} images of Fashion-MNIST to learn from, {len(test[0])} to judge on\n\nSwAV, without labels:')
    learn = pretrain(train, test)

    print('\nJudging the encoders and training the same network on labels ...')
    set_seed(0)
    res = compare({'random encoder':small_encoder(), 'SwAV, no labels':learn, 'from scratch on the labels':judge_from_scratch(train, test)},
                  tensor_dls(train, test, bs=500))
    print(f'\nOn test images\n\n{res}\n')
    (out/'table.md').write_text(f'{res}\n')

    plot_views(learn)
    plot_loss(learn)
    plot_monitor(learn)
    dls = tensor_dls(train, test, bs=500, vocab=fashion_mnist_classes, drop_last=False)
    plot_prototypes(learn, dls.train)
    plot_features(learn, dls.valid)
    plot_overview(learn, train[0], dls.valid)

    learn.export_encoder(out/'encoder.safetensors')
    subprocess.run([sys.executable, __file__, 'features'], check=True)
    assert torch.equal(extract_features(learn, dls.valid)[0], torch.load(out/'features.pth', weights_only=True)), 'the saved encoder gives other features'
    shutil.rmtree(out/'checkpoints') # this run is done: the next demo begins anew
    print(f'The encoder is in {out}/encoder.safetensors (loaded in a fresh process, it gives the same features),\n'
          f'pictures are in {out}/: {", ".join(sorted(o.name for o in out.glob("*.png")))}. {time.time()-start:.0f} s in all.')

if __name__=='__main__': features_of_saved_encoder() if sys.argv[1:]==['features'] else main()
