"""Sources for test_packing.py, each under a line `# == NAME`: what folding changes, and what it must not.

Behind the name of a rule stand the words that must have gone from the folded source.
"""

RULES = '''
# == setting | cfg width
def main():
    print(cfg.width * 2)

# == setting of an attribute | cfg width
class Run:
    def __init__(self):
        self.cfg = cfg
    def go(self):
        return self.cfg.width
def main():
    print(Run().go())

# == branch | lost
def main():
    if cfg.on:
        print(lost())
    else:
        print(1)

# == elif | lost
def main():
    if cfg.style == 'single':
        print(lost())
    elif cfg.width > 2:
        print(2)
    else:
        print(lost())

# == conditional | lost
def main():
    print(lost() if cfg.on else 5, 6 if cfg.width else lost())

# == boolean | lost
def main():
    print(cfg.on and lost(), cfg.width or lost(), not cfg.on)

# == membership | lost
def main():
    if cfg.style in ('a', 'b'):
        lost()
    print('x' in 'xyz')

# == chain | cfg
def main():
    for i in range(6):
        print(i, 0 < cfg.width <= i)

# == backend | lost
def main():
    if 'mlp' in backends.kernels:
        lost()
    print(backends.attention)

# == counted | lost COUNTED
COUNTED = False
def main():
    if not COUNTED:
        lost()
    print(1)

# == text | cfg
def main():
    print(f'{cfg.width}-{cfg.rate:.2f}-{cfg.style!r}')

# == dictionary | single
def main():
    x = 4
    print({'lanes': x, 'single': x + 1}[cfg.style])

# == unpacked dictionary | cfg
def f(a, b):
    return a - b
def main():
    print(f(**{'a': 7, 'b': cfg.width}), {**{'k': 1}})

# == star of a tuple | cfg
def f(*a):
    return a
def main():
    print(f(*(1, cfg.width)), [*[2, 3]])

# == behind an end | lost
def main():
    print(1)
    return
    print(lost())

# == assertion | assert
def main():
    assert cfg.width == 3
    print(1)

# == dead variable | dead dead2
def main():
    dead = [cfg.width, 2]
    dead2 = dead
    print(1)

# == dead effect | dead
def main():
    dead = print('still')
    print(1)

# == parameter of one value | lost size kind
def f(x, size, kind='a'):
    return x * size if kind == 'a' else lost()
def main():
    print([f(i, cfg.width) for i in (1, 2)])

# == unused parameter | lost
def f(x, lost):
    return x + x
def main():
    print(f(2, 3), f(4, 'b'))

# == keyword handed on | cache lost
def inner(x, *, cache=None):
    return [x, 1] if cache is None else lost()
def outer(*a, cache=None, **o):
    print(a)
    return inner(*a, cache=cache, **o)
def main():
    print(outer(1), outer(*(2,), cache=None))

# == constant function | lost
def f(x, name):
    return cfg.on and name in x
def main():
    y = 'a'
    if f(y, 'a'):
        print(lost())
    print(f(y, 'b'))

# == silent methods | Watch watch saw kept lost
class Watch:
    def saw(self, kind, **facts):
        pass
    def kept(self, stage):
        return None
class Run:
    def __init__(self):
        self.watch = Watch()
    def go(self):
        tell = self.watch.saw
        tell('start', run=self)
        if (state := self.watch.kept('x')) is not None:
            self.lost(state)
        print(1)
    def lost(self, state):
        print(state)
def main():
    Run().go()

# == attribute of one value | capped lost
class A:
    def __init__(self, n):
        self.capped, self.n = (cfg.on, n)
    def go(self):
        print(self.n if not self.capped else lost())
def main():
    A(4).go()

# == unreached definitions | lost Lost LOST
def lost():
    pass
class Lost:
    pass
LOST = {}
class A:
    def used(self):
        return 1
    def lost(self):
        return 2
def main():
    print(A().used())

# == docstrings and annotations | words lost
class P:
    """words"""
    x: int = 1
    def f(self, a: 'lost') -> 'lost':
        """words"""
        y: lost = a
        return y
def main():
    print(P().f(2), P.x)

# == errors | lost text
class Wrong(ValueError):
    """A fault."""
def f(x):
    text = f'lost {x}'
    if x > 2:
        raise Wrong(f'{x}: {text}') from None
def main():
    f(1)
    try:
        f(3)
    except Wrong as error:
        print('caught')

# == imports that nothing needs | json
import json
import math as m
def main():
    print(m.pi)
'''

SAME = """
# == shadowed
size = 5
def f(size):
    return size
def main():
    print(f(2), size, [size for size in (7, 8)])

# == shadowed constant
COUNTED = False
def f(COUNTED):
    return COUNTED
def main():
    print(f(0), f(2))

# == walrus
def main():
    print([y for x in (1, 2, 3) if (y := (x * 2)) > 2], y)
    while (z := y) > 9:
        pass

# == comprehension
x = 1
def main():
    y = 2
    print([x + y for x in range(y)], {x: y for y in (x,)}, x)

# == closure
def make(n):
    total = 0
    def add(k):
        nonlocal total
        total += k * n
        return total
    return add
def main():
    f, g = (make(1), make(2))
    print(f(1), f(1), g(3))

# == added in place
def main():
    rows = [[1], [2]]
    for row in rows:
        row += [3]
    first, second = rows
    first += [4]
    other = rows[1]
    other *= 2
    print(rows)

# == late closure
def main():
    fs = [lambda: i for i in range(3)]
    print([f() for f in fs])

# == global
count = 0
def up():
    global count
    count += 1
def main():
    (up(), up())
    print(count)

# == keywords of a dictionary
def f(*, alpha, beta=2):
    return alpha - beta
def main():
    options = {'alpha': 5}
    print(f(**options), f(alpha=1, **{'beta': 4}))

# == collected keywords
def event(stage, **values):
    return (stage, sorted(values))
def f(seconds):
    return seconds
def main():
    print(event('x', seconds=f(seconds=3), size=1))

# == attribute by name
class A:
    def __init__(self):
        self.left_side, self.right_side = (1, 2)
    def get(self, side):
        return getattr(self, f'{side}_side')
def main():
    print(A().get('left'), getattr(A(), 'right_side'), hasattr(A(), 'other'))

# == decorators
import contextlib, functools
@functools.cache
def f(x):
    print('once')
    return x
@contextlib.contextmanager
def block(name):
    print('in', name)
    yield
    print('out')
class A:
    @property
    def p(self):
        return self.go(1)
    @staticmethod
    def s(x):
        return x
    @classmethod
    def c(cls, x):
        return cls().go(x)
    @functools.cached_property
    def q(self):
        print('made')
        return 8
    def go(self, x):
        return x + 1
def main():
    a = A()
    print(f(1), f(1), a.p, a.s(3), A.c(4), a.q, a.q)
    with block('b'):
        pass

# == inheritance
class A:
    kind = 'a'
    def __init__(self, x):
        self.x = x
    def run(self):
        return self.step() * 2
    def step(self):
        raise NotImplementedError
class B(A):
    kind = 'b'
    def __init__(self, x, y):
        super().__init__(x)
        self.y = y
    def step(self):
        return self.x - self.y
class C(B):
    def step(self):
        return super().step() + 100
def main():
    for kind in (B, C):
        print(kind(5, 3).run(), kind.kind)

# == overridden silence
class A:
    def told(self):
        pass
class B(A):
    def told(self):
        print('b')
def main():
    for k in (A, B):
        k().told()

# == defaults
def f(a, b=[], *, c=1 + 1):
    b.append(a)
    return (b, c)
def main():
    print(f(1), f(2), f(3, []), f(4, c=9))

# == stars
def f(a, b, *rest, **more):
    return (a, b, rest, more)
def main():
    l, d = ([2, 3], {'k': 4})
    print(f(1, *l, 5), f(*l, **d), f(*[1], b=2))

# == named tuple
from typing import NamedTuple
class P(NamedTuple):
    first: int
    second: int = 7
    @property
    def both(self):
        return self.first + self.second
def main():
    p = P(first=1)
    q = p._replace(first=5)
    a, b = q
    print(q.both, a, b, p[1])

# == named tuples made by a call
from collections import namedtuple
from typing import NamedTuple
Window = namedtuple('Window', 'start length targets', defaults=[7])
Pair = NamedTuple('Pair', [('left', int), ('right', int)])
class Batch:
    def __init__(self, n):
        self.n = n
    @property
    def targets(self):
        return self.n + 1
    def left(self):
        return self.n - 1
    def start(self):
        return self.n
def main():
    for n in (1, 2):
        w, p, b = Window(n, length=2), Pair(n, 4), Batch(n)
        print(w.start, w.length, w.targets, w._replace(start=9))
        print(p.left, p.right, b.targets, b.left(), b.start())

# == data class
import dataclasses
from dataclasses import dataclass
@dataclass(frozen=True)
class D:
    one: int
    many: list = dataclasses.field(default_factory=list)
def main():
    d = D(1)
    d.many.append(2)
    print(d.one, d.many, D(one=1) == D(1, []))

# == order of effects
def say(x):
    print(x)
    return x
def pair(a, b):
    return (say(3), b, a)
def second(a, b):
    return b - a
def main():
    print(pair(say(1), say(2)), second(say(4), say(5)))

# == generator
class W:
    def units(self):
        if cfg.on:
            yield 1
        print('end')
def main():
    print([*W().units()])

# == loop
def main():
    n = 0
    while True:
        n += 1
        if n > cfg.width:
            break
        if n == 2:
            continue
        print(n)
    else:
        print('no')
    for _ in range(1):
        print('once')

# == try
def main():
    try:
        if cfg.on:
            raise ValueError
        print(int('x'))
    except (KeyError, ValueError) as error:
        print(type(error).__name__)
    else:
        print('none')
    finally:
        print('end')

# == arithmetic
def main():
    print(2 ** (-cfg.width), -7 // 2, (-3) ** 2, 1 << 20, 1 / 3, 0.1 + 0.2, 2.0 ** (-24))

# == swap
def main():
    a, b = (cfg.width, 4)
    a, b = (b, a)
    print(a, b)

# == chained
def main():
    a = b = [1]
    a.append(2)
    print(b)

# == library's names
class Box:
    def __init__(self):
        self.items, self.append = (3, 4)
def main():
    b, l = (Box(), [])
    l.append(b.items)
    print(l, b.append, {'k': 1}.items())
"""
