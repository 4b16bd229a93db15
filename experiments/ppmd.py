"""PPM-D over bytes: prediction by partial matching, order 5, compiled with numba.

The method is Cleary and Witten's (1984) with the full exclusion and the update exclusion of Moffat's PPMC
(1990) and the escape of Howard's PPMD ("The Design and Analysis of Efficient Lossless Data Compression
Systems", 1993): a new symbol adds one half to its own count and one half to the escape's. Exactly:

* A context of order k is the last k bytes; all orders from 5 down to 0 that have occurred are there. The
  longest one that has a count predicts first. Let S be its symbols that no longer context has excluded, c_s
  their counts, n their sum, d their number. Then p(s) = (2 c_s - 1) / 2n, and the escape has d / 2n: with it
  the context one byte shorter predicts, and the symbols of S are excluded from there on.
* No symbol left (d = 0): the shorter context predicts at no cost. All 256 symbols in S or excluded: there is
  nothing to escape to, so there is no escape, and p(s) = (2 c_s - 1) / (2n - d).
* Below order 0 every byte that is not excluded has the same share.
* After a byte is scored its count grows by one in the context that predicted it, and it enters each longer
  context with count 1 (shorter ones do not learn: update exclusion).

So the 256 probabilities sum to one before the byte is known (the published mixtures left the exclusion out:
their sums stay below one). `confident` says that in the longest context with a count one symbol has at least
nine tenths of the counts; nothing about the byte to come is used.

The contexts are the nodes of a trie: the children of the node "ab" are the symbols seen after "ab", and the
child "abc" is at the same time the context "abc". Each node points to its suffix ("bc"), which makes the
shorter contexts of a context, and a symbol's nodes in them, a walk without any search.
"""

import numba
import numpy as np

ORDER = 5
COUNT, SYMBOL, FIRST, NEXT, SUFFIX, TOTAL, DISTINCT, TOP = range(
    8
)  # columns of a node; TOP: largest child count
NODES_PER_BYTE = ORDER + 1  # at most so many are new


@numba.njit(cache=True)
def _known(nodes, context):
    """The longest context with a count, or -1."""
    while context >= 0 and nodes[context, TOTAL] == 0:
        context = nodes[context, SUFFIX]
    return context


@numba.njit(cache=True)
def _confident(nodes, context):
    """One symbol has nine tenths of the counts of the longest context that has any."""
    context = _known(nodes, context)
    return context >= 0 and 10 * nodes[context, TOP] >= 9 * nodes[context, TOTAL]


@numba.njit(cache=True)
def _child(nodes, context, symbol):
    """The node of a symbol in a context, moved to the front of its children; -1 where it is unknown."""
    before, child = -1, nodes[context, FIRST]
    while child >= 0 and nodes[child, SYMBOL] != symbol:
        before, child = child, nodes[child, NEXT]
    if child >= 0 and before >= 0:
        nodes[before, NEXT] = nodes[child, NEXT]
        nodes[child, NEXT] = nodes[context, FIRST]
        nodes[context, FIRST] = child
    return child


@numba.njit(cache=True)
def _probability(nodes, context, symbol):
    """p(symbol), the context that predicts it and the symbol's node there (-1 and -1: below order 0).

    The symbols of a context are among those of each shorter one, so that the excluded ones are always the
    children of the context before, and their suffixes are their nodes in this one.
    """
    probability, gone, gone_counts = 1.0, 0, 0
    context = _known(nodes, context)
    while context >= 0:
        total, distinct = nodes[context, TOTAL] - gone_counts, nodes[context, DISTINCT] - gone
        whole = 2 * total - distinct * (nodes[context, DISTINCT] == 256)
        found = _child(nodes, context, symbol)
        if found >= 0:
            return probability * (2 * nodes[found, COUNT] - 1) / whole, context, found
        if distinct:
            probability *= distinct / whole
        gone, gone_counts = nodes[context, DISTINCT], 0
        child = nodes[context, FIRST]
        while child >= 0:
            gone_counts += nodes[nodes[child, SUFFIX], COUNT]
            child = nodes[child, NEXT]
        context = nodes[context, SUFFIX]
    return probability / (256 - gone), -1, -1


@numba.njit(cache=True)
def _learn(nodes, state, symbol, predictor, found):
    """Count a symbol from the longest context down to the one that predicted it, and move on."""
    context, depth, used = state[0], state[1], state[2]
    newest = -1  # whose suffix is not known yet
    longest = -1
    while context != predictor:
        child, used = used, used + 1
        nodes[child] = 0
        nodes[child, COUNT], nodes[child, SYMBOL] = 1, symbol
        nodes[child, FIRST], nodes[child, NEXT] = -1, nodes[context, FIRST]
        nodes[context, FIRST] = child
        nodes[context, DISTINCT] += 1
        nodes[context, TOTAL] += 1
        nodes[context, TOP] = max(nodes[context, TOP], 1)
        if newest >= 0:
            nodes[newest, SUFFIX] = child
        else:
            longest = child
        newest, context = child, nodes[context, SUFFIX]
    if found >= 0:
        nodes[found, COUNT] += 1
        nodes[context, TOTAL] += 1
        nodes[context, TOP] = max(nodes[context, TOP], nodes[found, COUNT])
        if newest >= 0:
            nodes[newest, SUFFIX] = found
        else:
            longest = found
    state[0] = nodes[longest, SUFFIX] if depth == ORDER else longest
    state[1] = min(depth + 1, ORDER)
    state[2] = used


@numba.njit(cache=True)
def _advance(nodes, state, data, probabilities, confident):
    """Score and then learn each byte."""
    for i in range(len(data)):
        confident[i] = _confident(nodes, state[0])
        probabilities[i], predictor, found = _probability(nodes, state[0], data[i])
        _learn(nodes, state, data[i], predictor, found)


@numba.njit(cache=True)
def _distribution(nodes, context, out):
    for symbol in range(256):
        out[symbol] = _probability(nodes, context, symbol)[0]


@numba.njit(cache=True)
def _spell(nodes, state, data, starts, probabilities, confident):
    """Score each of several strings as if it came next; nothing is learnt, not even inside a string."""
    for word in range(len(starts) - 1):
        context, depth = state[0], state[1]
        for i in range(starts[word], starts[word + 1]):
            confident[i] = _confident(nodes, context)
            probabilities[i] = _probability(nodes, context, data[i])[0]
            child = -1
            while context >= 0:  # the longest context that the byte has been seen in gives the next one
                child = _child(nodes, context, data[i])
                if child >= 0:
                    break
                context, depth = nodes[context, SUFFIX], depth - 1
            if child < 0:
                context, depth = 0, 0
            elif depth == ORDER:
                context = nodes[child, SUFFIX]
            else:
                context, depth = child, depth + 1


class PPMD:
    """The model and what it has read so far: (bytes) -> probability of each, given all before it."""

    def __init__(self):
        self._nodes = np.zeros((1 << 12, 8), np.int32)
        self._nodes[0] = 0, 0, -1, -1, -1, 0, 0, 0
        self._state = np.array([0, 0, 1])  # context, its order, nodes in use

    @property
    def nodes(self) -> int:
        """Nodes of the trie, 32 bytes each."""
        return int(self._state[2])

    @property
    def confident(self) -> bool:
        """What `advance` would say of the next byte, whatever it is."""
        return _confident(self._nodes, self._state[0])

    def distribution(self) -> np.ndarray:
        """Probabilities of the next byte, float64 [256]; they sum to one."""
        out = np.empty(256)
        _distribution(self._nodes, self._state[0], out)
        return out

    def advance(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read bytes [n] uint8: the probability of each and `confident` before it, both [n]."""
        needed = self.nodes + NODES_PER_BYTE * len(data)
        if needed > len(self._nodes):
            grown = np.empty((max(needed, 2 * len(self._nodes)), 8), np.int32)
            grown[: self.nodes] = self._nodes[: self.nodes]
            self._nodes = grown
        probabilities, confident = np.empty(len(data)), np.empty(len(data), bool)
        _advance(self._nodes, self._state, data, probabilities, confident)
        return probabilities, confident

    def spell(self, data: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `advance` for each string data[starts[i]:starts[i+1]], as if it came next; learns nothing."""
        probabilities, confident = np.empty(len(data)), np.empty(len(data), bool)
        _spell(self._nodes, self._state, data, starts, probabilities, confident)
        return probabilities, confident
