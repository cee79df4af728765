"The whole public API: `from self_supervised.all import *`"
from self_supervised.core import *
from self_supervised.dist import *
from self_supervised.data import *
from self_supervised.augmentations import *
from self_supervised.layers import *
from self_supervised.multicrop import *
from self_supervised.sinkhorn import *
from self_supervised.queue import *
from self_supervised.vision.swav import *
from self_supervised.evaluation import *
