# SPDX-License-Identifier: GPL-3.0-or-later
"""The kernels of `peer`: what a rank stages in its slab, the meeting of all ranks, and what it fetches.

Two buffers of the slab take turns, by an epoch that counts exchanges in device memory, so that a replayed CUDA graph
goes on where the last one stopped. Exchange n uses buffer n % 2, and one meeting per exchange is enough:
  - fetch n reads what stage n wrote: a rank's flag says n + 1 after its stage n, and stage n ends when all flags do.
  - stage n + 2 overwrites what stage n wrote. It follows stage n + 1 on its rank, which ended when every flag said
    n + 2; a rank says that in its stage n + 1, which follows its fetch n on its stream. So every rank had read it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashfusemoe_ds.kernels.peer_slab import HEADER_BYTES, NO_ROOM, OPERATIONS, PEER_FAILED, TIMED_OUT

_TIMED_OUT = tl.constexpr(TIMED_OUT)
_PEER_FAILED = tl.constexpr(PEER_FAILED)
_NO_ROOM = tl.constexpr(NO_ROOM)
_DISPATCH = tl.constexpr(OPERATIONS.index("dispatch"))
_REDISPATCH = tl.constexpr(OPERATIONS.index("redispatch"))
_COMBINE = tl.constexpr(OPERATIONS.index("combine"))
_HEADER = tl.constexpr(HEADER_BYTES)
_GAVE_UP = tl.constexpr(1 << 62)  # a flag above every epoch
_NAN_WORD = tl.constexpr(0x7FFFFFFF)  # NaN as one float32 and as two bf16 or fp16
_EPOCH = tl.constexpr(0)
_TICKET = tl.constexpr(1)
_STATUS = tl.constexpr(2)


@triton.jit
def _wait_until(addresses, target, timeout_ns):
    """The flags at these addresses when they reached `target`, or when time was up."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .pred late;
        .reg .pred again;
        .reg .s64 seen;
        .reg .u64 now;
        .reg .u64 end;
        mov.u64 end, %globaltimer;
        add.u64 end, end, $3;
        POLL:
        ld.acquire.sys.global.s64 seen, [$1];
        setp.lt.s64 late, seen, $2;
        mov.u64 now, %globaltimer;
        setp.lt.and.u64 again, now, end, late;
        @again nanosleep.u32 32;
        @again bra POLL;
        mov.s64 $0, seen;
        }
        """,
        "=l,l,l,l",
        [addresses, target, timeout_ns],
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _fail(state_ptr, failure_ptr, what):
    """Notes what went wrong, if anything did (0: nothing) and nothing has before."""
    first = (what != 0) & (tl.load(state_ptr + _STATUS) == 0)
    tl.store(state_ptr + _STATUS, what, mask=first)
    tl.store(failure_ptr, what, mask=first)


@triton.jit
def _tell(peers_ptr, value, RANK: tl.constexpr, P: tl.constexpr, P2: tl.constexpr):
    """Sets this rank's flag in every slab. What was written before is visible to whoever sees it."""
    ranks = tl.arange(0, P2)
    flags = (tl.load(peers_ptr + ranks, mask=ranks < P, other=0) + RANK * 8).to(tl.pointer_type(tl.int64))
    tl.atomic_xchg(flags, tl.zeros([P2], tl.int64) + value, mask=ranks < P, sem="release", scope="sys")


@triton.jit
def _meet(
    state_ptr, peers_ptr, failure_ptr, timeout_ns, OP: tl.constexpr, RANK: tl.constexpr, P: tl.constexpr,
    P2: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Ends a stage. True in the one program that has waited for the other ranks; the others are done."""
    # The barrier and the ticket put every program's writes before the flag.
    tl.debug_barrier()
    last = tl.atomic_add(state_ptr + _TICKET, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        epoch = tl.load(state_ptr + _EPOCH)
        failed = tl.load(state_ptr + _STATUS) != 0
        _tell(peers_ptr, tl.where(failed, _GAVE_UP, epoch + 1), RANK, P, P2)
        if WAIT:
            ranks = tl.arange(0, P2)
            own = tl.load(peers_ptr + RANK)
            addresses = own + tl.where(ranks < P, ranks, RANK) * 8
            patience = tl.zeros([P2], tl.int64) + tl.where(failed, 0, timeout_ns)
            seen = _wait_until(addresses, tl.zeros([P2], tl.int64) + epoch + 1, patience)
            gone = tl.sum(tl.where((ranks < P) & (seen >= _GAVE_UP), 1 << ranks, 0), axis=0)
            late = tl.sum(tl.where((ranks < P) & (seen <= epoch), 1 << ranks, 0), axis=0)
            why = tl.where(gone != 0, _PEER_FAILED, tl.where(late != 0, _TIMED_OUT, 0))
            who = tl.where(gone != 0, gone, late).to(tl.int64)
            _fail(state_ptr, failure_ptr, tl.where(why != 0, why + OP * 16 + who * 256, 0))
            tl.debug_barrier()
        tl.store(state_ptr + _TICKET, 0)
        tl.store(state_ptr + _EPOCH, epoch + 1)
    return last


@triton.jit
def _buffer(peers_ptr, rank, epoch, BUFFER: tl.constexpr):
    """Address of a rank's buffer for an epoch."""
    return tl.load(peers_ptr + rank) + _HEADER + (epoch & 1) * BUFFER


@triton.jit
def _pointer(address, element: tl.constexpr):
    """To what lies at addresses that 16 divides. The compiler must hear it, or it moves word by word; it forgets it of
    a single address to which a constant was added last."""
    return tl.multiple_of(address.to(tl.pointer_type(element)), 16)


@triton.jit
def _words(address):
    return _pointer(address, tl.int32)


@triton.jit
def _copy_flat(from_ptr, to_ptr, num_entries, program, num_programs, FLAT: tl.constexpr):
    for first in range(program * FLAT, num_entries, num_programs * FLAT):
        at = first + tl.arange(0, FLAT)
        values = tl.load(from_ptr + at, mask=at < num_entries, other=0)
        tl.store(to_ptr + at, values.to(to_ptr.dtype.element_ty), mask=at < num_entries)


@triton.jit
def _copy_rows(
    from_ptr, to, num_rows, gap_start, gap, program, num_programs, W: tl.constexpr, ROWS: tl.constexpr,
    WORDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of W words to an address, leaving out `gap` of them from row gap_start on."""
    strips: tl.constexpr = (W + WORDS - 1) // WORDS
    for tile in tl.range(program, tl.cdiv(num_rows, ROWS) * strips, num_programs, num_stages=STAGES):
        rows = (tile // strips) * ROWS + tl.arange(0, ROWS)
        columns = (tile % strips) * WORDS + tl.arange(0, WORDS)[None, :]
        mask = (rows < num_rows)[:, None] & (columns < W)
        source = (rows + tl.where(rows < gap_start, 0, gap)).to(tl.int64)
        values = tl.load(from_ptr + source[:, None] * W + columns, mask=mask)
        to_ptr = _words(to + rows.to(tl.int64) * (W * 4))
        tl.store(to_ptr[:, None] + columns, values, mask=mask)


@triton.jit
def _place(
    idx_ptr, pos_ptr, list_ptr, counts_ptr, num_tokens, dest, LOCAL_EXPERTS: tl.constexpr, P: tl.constexpr,
    K: tl.constexpr, K2: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Lists the tokens that go to one rank, in order, and counts them and their routes there."""
    lanes = tl.arange(0, CHUNK)
    k = tl.arange(0, K2)[None, :]
    num_rows = tl.zeros([], tl.int32)
    num_routes = tl.zeros([], tl.int32)
    for first in range(0, num_tokens, CHUNK):
        tokens = first + lanes
        mask = (tokens < num_tokens)[:, None] & (k < K)
        idx = tl.load(idx_ptr + tokens.to(tl.int64)[:, None] * K + k, mask=mask, other=-1)
        here = (idx >= dest * LOCAL_EXPERTS) & (idx < (dest + 1) * LOCAL_EXPERTS)
        routes = tl.sum(here.to(tl.int32), axis=1)
        goes = (routes > 0).to(tl.int32)
        pos = num_rows + tl.cumsum(goes, 0) - goes
        tl.store(list_ptr + pos, tokens, mask=goes > 0)
        tl.store(pos_ptr + tokens.to(tl.int64) * P + dest, tl.where(goes > 0, pos, -1), mask=tokens < num_tokens)
        num_rows += tl.sum(goes, axis=0)
        num_routes += tl.sum(routes, axis=0)
    tl.store(counts_ptr + dest, num_rows)
    tl.store(counts_ptr + P + dest, num_routes)


@triton.jit
def _plan(
    plan_ptr, peers_ptr, state_ptr, failure_ptr, epoch, max_rows, max_routes, RANK: tl.constexpr, P: tl.constexpr,
    P2: tl.constexpr, BUFFER: tl.constexpr, AT_COUNTS: tl.constexpr,
):  # fmt: skip
    """Reads all ranks' counts. Nothing is planned where there is no room, or after a failure."""
    sources = tl.arange(0, P2)
    bases = tl.load(peers_ptr + sources, mask=sources < P, other=0) + _HEADER + (epoch & 1) * BUFFER + AT_COUNTS
    # [source, destination]: rows.
    dests = tl.arange(0, P2)
    mask = (sources < P)[:, None] & (dests < P)[None, :]
    rows = tl.load(_words(bases)[:, None] + dests[None, :], mask=mask, other=0)
    routes = tl.load(_words(bases) + P + RANK, mask=sources < P, other=0)
    num_routes = tl.sum(routes.to(tl.int64), axis=0)
    # Rows that go home within a rank are not staged, so they take no place among those that are.
    before = (sources < RANK)[:, None] & ((sources[:, None] != dests[None, :]) | (dests == RANK)[None, :])
    base = tl.sum(tl.where(before, rows, 0), axis=0)
    mine = tl.sum(tl.where((dests == RANK)[None, :], rows, 0), axis=1)
    num_rows = tl.sum(mine, axis=0)

    full = (num_rows > max_rows) | (num_routes > max_routes)
    _fail(state_ptr, failure_ptr, tl.where(full, _NO_ROOM + num_routes * 256, 0))
    fine = (tl.load(state_ptr + _STATUS) == 0) & (full == 0)
    tl.store(plan_ptr + sources, tl.where(fine, tl.cumsum(mine, 0), 0), mask=sources < P)
    tl.store(plan_ptr + P + dests, tl.where(fine, base, 0), mask=dests < P)
    tl.store(plan_ptr + 2 * P, tl.where(fine, num_rows, 0))
    tl.store(plan_ptr + 2 * P + 1, tl.where(fine, num_routes.to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_tokens", "max_rows", "max_routes", "timeout_ns"])
def stage_dispatch_kernel(
    x_ptr,
    idx_ptr,
    weight_ptr,
    pos_ptr,
    plan_ptr,
    peers_ptr,
    state_ptr,
    failure_ptr,
    num_tokens,
    max_rows,
    max_routes,
    timeout_ns,
    LOCAL_EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    W: tl.constexpr,
    BUFFER: tl.constexpr,
    AT_COUNTS: tl.constexpr,
    AT_LISTS: tl.constexpr,
    AT_IDX: tl.constexpr,
    AT_WEIGHTS: tl.constexpr,
    AT_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
    FLAT: tl.constexpr,
    WAIT: tl.constexpr,
):
    program = tl.program_id(0)
    epoch = tl.load(state_ptr + _EPOCH)
    buffer = _buffer(peers_ptr, RANK, epoch, BUFFER)
    # The lists take longest for their size, so they come first.
    if program < P:
        _place(
            idx_ptr, pos_ptr, _words(buffer + AT_LISTS) + program * C, _words(buffer + AT_COUNTS), num_tokens, program,
            LOCAL_EXPERTS, P, K, K2, CHUNK,
        )  # fmt: skip
    else:
        copier, copiers = program - P, tl.num_programs(0) - P
        _copy_rows(x_ptr, buffer + AT_ROWS, num_tokens, num_tokens, 0, copier, copiers, W, ROWS, WORDS, STAGES)
        _copy_flat(idx_ptr, _words(buffer + AT_IDX), num_tokens * K, copier, copiers, FLAT)
        weights_ptr = _pointer(buffer + AT_WEIGHTS, tl.float32)
        _copy_flat(weight_ptr, weights_ptr, num_tokens * K, copier, copiers, FLAT)
    if _meet(state_ptr, peers_ptr, failure_ptr, timeout_ns, _DISPATCH, RANK, P, P2, WAIT):
        if WAIT:
            _plan(
                plan_ptr, peers_ptr, state_ptr, failure_ptr, epoch, max_rows, max_routes, RANK, P, P2, BUFFER,
                AT_COUNTS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["max_rows", "max_routes"])
def plan_kernel(
    plan_ptr, peers_ptr, state_ptr, failure_ptr, max_rows, max_routes, RANK: tl.constexpr, P: tl.constexpr,
    P2: tl.constexpr, BUFFER: tl.constexpr, AT_COUNTS: tl.constexpr,
):  # fmt: skip
    """What the stage does after it has waited, for ranks that take turns in one process."""
    epoch = tl.load(state_ptr + _EPOCH) - 1
    _plan(plan_ptr, peers_ptr, state_ptr, failure_ptr, epoch, max_rows, max_routes, RANK, P, P2, BUFFER, AT_COUNTS)


@triton.jit(do_not_specialize=["num_rows", "timeout_ns"])
def stage_rows_kernel(
    x_ptr,
    weight_ptr,
    plan_ptr,
    peers_ptr,
    state_ptr,
    failure_ptr,
    num_rows,
    timeout_ns,
    RANK: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    BUFFER: tl.constexpr,
    AT_ROWS: tl.constexpr,
    AT_HOME_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    STAGES: tl.constexpr,
    FLAT: tl.constexpr,
    HOME: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    WAIT: tl.constexpr,
):
    """HOME: the rows are those of a dispatch, and those that came from this rank itself are left out."""
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    buffer = _buffer(peers_ptr, RANK, tl.load(state_ptr + _EPOCH), BUFFER)
    if HOME:
        own_start = tl.zeros([], tl.int32)
        if RANK > 0:
            own_start = tl.load(plan_ptr + RANK - 1)
        own = tl.load(plan_ptr + RANK) - own_start
        count = tl.load(plan_ptr + 2 * P) - own
        _copy_rows(x_ptr, buffer + AT_ROWS, count, own_start, own, program, num_programs, W, ROWS, WORDS, STAGES)
        if HAS_WEIGHTS:
            to_ptr = _pointer(buffer + AT_HOME_WEIGHTS, tl.float32)
            _copy_flat(weight_ptr, to_ptr, own_start * K, program, num_programs, FLAT)
            after_ptr = weight_ptr + (own_start + own).to(tl.int64) * K
            _copy_flat(after_ptr, to_ptr + own_start * K, (count - own_start) * K, program, num_programs, FLAT)
        _meet(state_ptr, peers_ptr, failure_ptr, timeout_ns, _COMBINE, RANK, P, P2, WAIT)
    else:
        _copy_rows(x_ptr, buffer + AT_ROWS, num_rows, num_rows, 0, program, num_programs, W, ROWS, WORDS, STAGES)
        _meet(state_ptr, peers_ptr, failure_ptr, timeout_ns, _REDISPATCH, RANK, P, P2, WAIT)


@triton.jit
def _origins(
    rows, ends, total, sources, peers_ptr, epoch, RANK: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
    BUFFER: tl.constexpr, AT_LISTS: tl.constexpr,
):  # fmt: skip
    """Of received rows: the rank and the token that each comes from, as rank * C + token; 0 past the end."""
    valid = rows < total
    passed = (rows[:, None] >= ends[None, :]) & (sources < P - 1)[None, :]
    source = tl.sum(passed.to(tl.int32), axis=1)
    start = tl.max(tl.where(passed, ends[None, :], 0), axis=1)
    lists = _buffer(peers_ptr, source, epoch, BUFFER) + AT_LISTS
    token = tl.load(_words(lists) + RANK * C + rows - start, mask=valid, other=0)
    return tl.where(valid, source * C + token, 0)


@triton.jit
def _fetch_tiles(
    x_ptr, out_ptr, origin_ptr, readable, limit, peers_ptr, epoch, RANK: tl.constexpr, C: tl.constexpr,
    W: tl.constexpr, BUFFER: tl.constexpr, AT_ROWS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th tile of rows, by their origins; NaN from row `readable` on."""
    strips: tl.constexpr = (W + WORDS - 1) // WORDS
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    num_tiles = tl.cdiv(tl.cdiv(limit, ROWS) - program, num_programs)
    for i in tl.range(0, num_tiles * strips, num_stages=STAGES):
        rows = (program + (i // strips) * num_programs) * ROWS + tl.arange(0, ROWS)
        columns = (i % strips) * WORDS + tl.arange(0, WORDS)[None, :]
        origin = tl.load(origin_ptr + rows, mask=rows < readable, other=0)
        source = origin // C
        theirs = _buffer(peers_ptr, source, epoch, BUFFER) + AT_ROWS
        # A row of one's own is read where it lies.
        address = tl.where(source == RANK, x_ptr.to(tl.int64), theirs) + (origin % C).to(tl.int64) * (W * 4)
        mask = (rows < readable)[:, None] & (columns < W)
        values = tl.load(_words(address)[:, None] + columns, mask=mask, other=_NAN_WORD)
        to_ptr = out_ptr + rows.to(tl.int64)[:, None] * W + columns
        tl.store(to_ptr, values, mask=(rows < limit)[:, None] & (columns < W))


@triton.jit(do_not_specialize=["max_rows"])
def fetch_dispatch_kernel(
    x_ptr,
    out_ptr,
    idx_ptr,
    weight_ptr,
    origin_ptr,
    plan_ptr,
    peers_ptr,
    state_ptr,
    max_rows,
    LOCAL_EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    W: tl.constexpr,
    BUFFER: tl.constexpr,
    AT_LISTS: tl.constexpr,
    AT_IDX: tl.constexpr,
    AT_WEIGHTS: tl.constexpr,
    AT_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    STAGES: tl.constexpr,
    PLACES: tl.constexpr,
    FLAT: tl.constexpr,
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    epoch = tl.load(state_ptr + _EPOCH) - 1
    fine = tl.load(state_ptr + _STATUS) == 0
    sources = tl.arange(0, P2)
    ends = tl.load(plan_ptr + sources, mask=sources < P, other=0)
    total = tl.load(plan_ptr + 2 * P)
    # Rows up to `limit` are written; after a failure that is all of them, none of them read.
    limit = tl.where(fine, total, max_rows)
    readable = tl.where(fine, total, 0)
    # First, of all rows that this program fetches, where they come from, their ids and weights: a row then waits for
    # one trip over the wire, not for two.
    lanes = tl.arange(0, PLACES)
    k = tl.arange(0, K2)[None, :]
    num_tiles = tl.cdiv(tl.cdiv(limit, ROWS) - program, num_programs)
    for first in range(0, num_tiles * ROWS, PLACES):
        rows = (program + ((first + lanes) // ROWS) * num_programs) * ROWS + lanes % ROWS
        origin = _origins(rows, ends, readable, sources, peers_ptr, epoch, RANK, P, C, BUFFER, AT_LISTS)
        theirs = _buffer(peers_ptr, origin // C, epoch, BUFFER)
        at = (origin % C).to(tl.int64)[:, None] * K + k
        mask = (rows < readable)[:, None] & (k < K)
        idx = tl.load(_words(theirs + AT_IDX)[:, None] + at, mask=mask, other=-1)
        weight = tl.load(_pointer(theirs + AT_WEIGHTS, tl.float32)[:, None] + at, mask=mask, other=0.0)
        idx = idx - RANK * LOCAL_EXPERTS
        idx = tl.where((idx >= 0) & (idx < LOCAL_EXPERTS), idx, -1).to(tl.int64)
        to = rows.to(tl.int64)[:, None] * K + k
        mask = (rows < limit)[:, None] & (k < K)
        tl.store(idx_ptr + to, idx, mask=mask)
        tl.store(weight_ptr + to, weight, mask=mask)
        tl.store(origin_ptr + rows, origin, mask=rows < limit)
    tl.debug_barrier()
    _fetch_tiles(
        x_ptr, out_ptr, origin_ptr, readable, limit, peers_ptr, epoch, RANK, C, W, BUFFER, AT_ROWS, ROWS, WORDS, STAGES
    )
    # Rows that nobody sent belong to no expert.
    for first in range(limit * K + program * FLAT, max_rows * K, num_programs * FLAT):
        at = first + tl.arange(0, FLAT)
        tl.store(idx_ptr + at, tl.full([FLAT], -1, tl.int64), mask=at < max_rows * K)


@triton.jit(do_not_specialize=["max_rows"])
def fetch_rows_kernel(
    x_ptr,
    out_ptr,
    origin_ptr,
    plan_ptr,
    peers_ptr,
    state_ptr,
    max_rows,
    RANK: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    BUFFER: tl.constexpr,
    AT_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    STAGES: tl.constexpr,
):
    epoch = tl.load(state_ptr + _EPOCH) - 1
    fine = tl.load(state_ptr + _STATUS) == 0
    total = tl.load(plan_ptr + 2 * P)
    _fetch_tiles(
        x_ptr, out_ptr, origin_ptr, tl.where(fine, total, 0), tl.where(fine, total, max_rows), peers_ptr, epoch,
        RANK, C, W, BUFFER, AT_ROWS, ROWS, WORDS, STAGES,
    )  # fmt: skip


@triton.jit
def _sent_home(
    own_ptr, pos, ranks, p: tl.constexpr, plan_ptr, peers_ptr, epoch, RANK: tl.constexpr, P: tl.constexpr,
    BUFFER: tl.constexpr, AT: tl.constexpr, ROW_BYTES: tl.constexpr,
):  # fmt: skip
    """Addresses of what rank p has for some tokens, and for which it has anything. pos: [tokens, ranks]."""
    pos_p = tl.sum(tl.where(ranks == p, pos, 0), axis=1)
    if p == RANK:
        start = own_ptr.to(tl.int64)  # where it lies: a rank stages nothing for itself
    else:
        start = _buffer(peers_ptr, p, epoch, BUFFER) + AT
    row = tl.load(plan_ptr + P + p) + pos_p
    return start + row.to(tl.int64) * ROW_BYTES, pos_p >= 0


@triton.jit(do_not_specialize=["num_tokens"])
def sum_home_kernel(
    y_ptr,
    weight_ptr,
    out_ptr,
    weight_out_ptr,
    pos_ptr,
    plan_ptr,
    peers_ptr,
    state_ptr,
    num_tokens,
    RANK: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    D: tl.constexpr,
    BUFFER: tl.constexpr,
    AT_ROWS: tl.constexpr,
    AT_HOME_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):
    strips: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    element: tl.constexpr = y_ptr.dtype.element_ty
    row_bytes: tl.constexpr = D * (element.primitive_bitwidth // 8)
    epoch = tl.load(state_ptr + _EPOCH) - 1
    fine = tl.load(state_ptr + _STATUS) == 0
    readable = tl.where(fine, num_tokens, 0)
    ranks = tl.arange(0, P2)[None, :]
    k = tl.arange(0, K2)[None, :]
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_tokens, ROWS) * strips, tl.num_programs(0), num_stages=STAGES):
        tokens = (tile // strips) * ROWS + tl.arange(0, ROWS)
        columns = (tile % strips) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        # All places in one load: those of rank p + 1 must not wait for the rows of rank p.
        here = (tokens < readable)[:, None] & (ranks < P)
        pos = tl.load(pos_ptr + tokens.to(tl.int64)[:, None] * P + ranks, mask=here, other=-1)
        if HAS_WEIGHTS:
            weight_total = tl.zeros([ROWS, K2], tl.float32)
            # Only the first strip's program stores them, and only it loads them.
            at_first = k < tl.where(tile % strips == 0, K, 0)
            for p in tl.static_range(P):
                address, sent = _sent_home(
                    weight_ptr, pos, ranks, p, plan_ptr, peers_ptr, epoch, RANK, P, BUFFER, AT_HOME_WEIGHTS, K * 4
                )
                ptrs = address.to(tl.pointer_type(tl.float32))[:, None] + k
                weight_total += tl.load(ptrs, mask=sent[:, None] & at_first, other=0.0)
        rows = ()
        for p in tl.static_range(P):
            address, sent = _sent_home(
                y_ptr, pos, ranks, p, plan_ptr, peers_ptr, epoch, RANK, P, BUFFER, AT_ROWS, row_bytes
            )
            ptrs = _pointer(address, element)[:, None] + columns
            rows += (tl.load(ptrs, mask=sent[:, None] & (columns < D), other=0.0),)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for p in tl.static_range(P):
            total += rows[p].to(tl.float32)
        mask = (tokens < num_tokens)[:, None]
        at = tokens.to(tl.int64)[:, None]
        total = tl.where(fine, total, float("nan"))
        tl.store(out_ptr + at * D + columns, total.to(element), mask=mask & (columns < D))
        if HAS_WEIGHTS:
            weight_total = tl.where(fine, weight_total, float("nan"))
            tl.store(weight_out_ptr + at * K + k, weight_total, mask=mask & at_first)


@triton.jit
def give_up_kernel(
    peers_ptr, state_ptr, failure_ptr, OP: tl.constexpr, RANK: tl.constexpr, P: tl.constexpr, P2: tl.constexpr
):  # fmt: skip
    _fail(state_ptr, failure_ptr, _PEER_FAILED + OP * 16 + (256 << RANK))
    _tell(peers_ptr, _GAVE_UP, RANK, P, P2)
