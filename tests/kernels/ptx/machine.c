// The machine that runs PTX after decoder.py has decoded it. In the place of HANDLERS, machine.py writes a function for
// each instruction that works on registers alone, over the 32 lanes of a warp.
//
// A warp runs in lockstep until it waits at a barrier or ends; which warp runs next, of all programs that are resident,
// is drawn at random. Memory has no caches and no store buffers. Instead each access is checked to be ordered after what
// other threads did to the same place, by what PTX's memory model calls causality order: barriers order the threads of a
// program, and an atomic that releases orders what its thread did and what barriers put before it, for all that acquire
// later. Code without such races does the same on a GPU, however late its stores arrive there.
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef uint8_t u8;
typedef int8_t s8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef _Float16 f16;
typedef float f32;
typedef double f64;

enum { LANES = 32, MANY = 0x7ff };  // MANY stands for several threads of one program
enum { PURE, BRANCH, BARRIER, RETURN, LOAD, STORE, ATOMIC_ADD };  // as in machine.py
enum { READ, WRITE, REPEAT, ATOMIC };  // REPEAT writes what is there already
enum { ACQUIRE = 1, RELEASE = 2 };

typedef struct {
    s32 kind, handler;
    s32 guard, negated;    // register of the predicate, or -1
    s32 operands[10];      // registers: offsets into the register file of a warp
    s32 element, vector;   // bytes of an element of memory, and how many there are
    s32 width, is_signed;  // bytes a lane of a register that is loaded or stored, or of a result
    s32 shared, target;    // whether it is shared memory; where a branch leads, or the order of an atomic
    s64 offset;            // added to the address
} Instruction;

static u32 bits(f32 x) { u32 y; memcpy(&y, &x, 4); return y; }
static f32 real(u32 x) { f32 y; memcpy(&y, &x, 4); return y; }
static f32 from_f16(u16 x) { f16 y; memcpy(&y, &x, 2); return y; }
static u16 to_f16(f32 x) { f16 y = x; u16 z; memcpy(&z, &y, 2); return z; }
static f32 from_bf16(u16 x) { return real((u32)x << 16); }
static u16 to_bf16(f32 x) { u32 y = bits(x); return x != x ? 0x7fff : (y + 0x7fff + (y >> 16 & 1)) >> 16; }

typedef void Handler(u8 *registers, const s32 *operands);
#include HANDLERS

typedef struct { u64 write, read; } Shadow;  // who last wrote and read a granule of memory: stamps, 0 for nobody
typedef struct { u64 begin, end, granule; Shadow *shadow; } Region;  // memory of tensors
typedef struct { s32 program, thread, previous; u32 barrier, now; } Release;  // `previous` of the same program, or -1
typedef struct { char what[120]; s32 instruction, program, thread, other_program, other_thread; } Fault;

typedef struct {
    const Instruction *code;
    const u8 *constants;  // what follows the registers: the special ones, parameters and constants
    s32 registers, file;  // bytes of the registers alone, and with what follows them
    s32 warps, shared, grid, resident;
    Region *regions;
    s32 region_count;
    u32 seed;
} Machine;

typedef struct {
    s32 id, waiting, ended, barrier_at;
    u32 now, barrier;       // the program's clock, which barriers and releases advance; its value after the last barrier
    s32 acquired;           // how many releases happened before all that its threads do
    s32 *acquired_by;       // the same for one thread
    u8 *memory;             // shared memory
    Shadow *shadow;
} Program;

typedef struct { s32 at, index; Program *program; u8 *registers; } Warp;

typedef struct {
    const Machine *machine;
    Release *releases;
    s32 release_count, release_room;
    s32 *last_release;      // of each program
    s64 steps;
    u32 random;
    Fault *fault;
    jmp_buf stop;
} Launch;

static _Noreturn void refuse(Launch *l, const Warp *w, s32 lane, const char *what) {
    strncpy(l->fault->what, what, sizeof l->fault->what - 1);
    l->fault->instruction = w->at;
    l->fault->program = w->program->id;
    l->fault->thread = w->index * LANES + lane;
    longjmp(l->stop, 1);
}

static u32 draw(Launch *l, u32 below) {
    l->random ^= l->random << 13;
    l->random ^= l->random >> 17;
    l->random ^= l->random << 5;
    return l->random % below;
}

// A stamp: whether it was an atomic, the program, the thread and the program's clock.
static u64 stamp(const Program *p, s32 thread, s32 atomic) {
    return (u64)atomic << 63 | (u64)(p->id + 1) << 43 | (u64)thread << 32 | p->now;
}
static s32 program_of(u64 stamp) { return (s32)(stamp >> 43 & 0xfffff) - 1; }
static s32 thread_of(u64 stamp) { return stamp >> 32 & MANY; }

static _Noreturn void race(Launch *l, const Warp *w, s32 lane, u64 other, const char *what) {
    l->fault->other_program = program_of(other);
    l->fault->other_thread = thread_of(other) == MANY ? -1 : thread_of(other);
    refuse(l, w, lane, what);
}

// Whether what left the stamp happened before what the thread does now.
static s32 ordered(const Launch *l, const Program *p, s32 thread, u64 stamp) {
    s32 other = program_of(stamp), its_thread = thread_of(stamp);
    u32 time = (u32)stamp;
    if (other == p->id && (its_thread == thread || time < p->barrier)) return 1;
    s32 known = p->acquired > p->acquired_by[thread] ? p->acquired : p->acquired_by[thread];
    for (s32 i = l->last_release[other]; i >= 0; i = l->releases[i].previous) {
        const Release *r = &l->releases[i];
        if (i < known && (time < r->barrier || (r->thread == its_thread && time <= r->now))) return 1;
    }
    return 0;
}

typedef struct { u8 *at; Shadow *shadow; s32 granules; } Place;

// Where an access to `bytes` at an address of shared or of global memory goes.
static Place locate(Launch *l, const Warp *w, const Instruction *i, s32 lane, u64 address, s32 bytes) {
    const Machine *m = l->machine;
    Program *p = w->program;
    if (address % bytes) refuse(l, w, lane, "a misaligned access");
    if (i->shared) {
        if (address >= (u64)m->shared || (u64)bytes > m->shared - address)
            refuse(l, w, lane, "an access outside of shared memory");
        return (Place){p->memory + address, p->shadow + address, bytes};
    }
    for (const Region *r = m->regions; r < m->regions + m->region_count; r++)
        if (address >= r->begin && address < r->end && (u64)bytes <= r->end - address) {
            u64 first = (address - r->begin) / r->granule, last = (address - r->begin + bytes - 1) / r->granule;
            return (Place){(u8 *)address, r->shadow + first, last - first + 1};
        }
    refuse(l, w, lane, "an access outside of the tensors that the kernel was given");
}

// Check that an access is ordered after what others did there, and remember it.
static void touch(Launch *l, const Warp *w, s32 lane, const Place *place, s32 access) {
    const Program *p = w->program;
    s32 thread = w->index * LANES + lane;
    u64 mine = stamp(p, thread, access == ATOMIC);
    for (Shadow *s = place->shadow; s < place->shadow + place->granules; s++) {
        s32 of_warp = program_of(s->write) == p->id && thread_of(s->write) / LANES == w->index;
        s32 fine = (access == ATOMIC && s->write >> 63) || (access == REPEAT && of_warp);
        if (!fine && s->write && !ordered(l, p, thread, s->write))
            race(l, w, lane, s->write, access == READ ? "a race: reads what another thread wrote"
                                                      : "a race: overwrites what another thread wrote");
        if (access != READ && s->read && !ordered(l, p, thread, s->read))
            race(l, w, lane, s->read, "a race: overwrites what another thread read");
        if (access != READ) s->write = mine;
        else if (s->read >> 43 == mine >> 43 && (u32)s->read == (u32)mine && s->read != mine)
            s->read = mine | (u64)MANY << 32;
        else s->read = mine;
    }
}

static u64 address_of(const u8 *registers, const Instruction *i, s32 lane) {
    const u8 *base = registers + i->operands[0];
    return i->shared ? (u32)(((const u32 *)base)[lane] + i->offset) : ((const u64 *)base)[lane] + i->offset;
}

static void put(u8 *registers, const Instruction *i, s32 lane, const u8 *from) {
    for (s32 v = 0; v < i->vector; v++) {
        u64 x = 0;
        memcpy(&x, from + v * i->element, i->element);
        if (i->is_signed) x = (s64)(x << (64 - 8 * i->element)) >> (64 - 8 * i->element);
        if (i->operands[1 + v] >= 0) memcpy(registers + i->operands[1 + v] + lane * i->width, &x, i->width);
    }
}

static void load(Launch *l, const Warp *w, const Instruction *i, s32 lane) {
    Place from = locate(l, w, i, lane, address_of(w->registers, i, lane), i->element * i->vector);
    touch(l, w, lane, &from, READ);
    put(w->registers, i, lane, from.at);
}

static void store(Launch *l, const Warp *w, const Instruction *i, s32 lane) {
    u8 values[32];
    s32 bytes = i->element * i->vector;
    for (s32 v = 0; v < i->vector; v++)
        memcpy(values + v * i->element, w->registers + i->operands[1 + v] + lane * i->width, i->element);
    Place to = locate(l, w, i, lane, address_of(w->registers, i, lane), bytes);
    touch(l, w, lane, &to, memcmp(to.at, values, bytes) ? WRITE : REPEAT);
    memcpy(to.at, values, bytes);
}

static void atomic_add(Launch *l, const Warp *w, const Instruction *i, s32 lane) {
    Program *p = w->program;
    s32 thread = w->index * LANES + lane;
    Place at = locate(l, w, i, lane, address_of(w->registers, i, lane), i->element);
    touch(l, w, lane, &at, ATOMIC);
    u64 old = 0, value = 0;
    memcpy(&old, at.at, i->element);
    memcpy(&value, w->registers + i->operands[2] + lane * i->width, i->element);
    value += old;
    memcpy(at.at, &value, i->element);
    if (i->operands[1] >= 0) memcpy(w->registers + i->operands[1] + lane * i->width, &old, i->width);
    if (i->target & ACQUIRE) p->acquired_by[thread] = l->release_count;
    if (i->target & RELEASE) {
        if (l->release_count == l->release_room) {
            l->release_room = 2 * l->release_room + 64;
            l->releases = realloc(l->releases, l->release_room * sizeof *l->releases);
        }
        l->releases[l->release_count] = (Release){p->id, thread, l->last_release[p->id], p->barrier, p->now};
        l->last_release[p->id] = l->release_count++;
        p->now++;
    }
}

enum { ENDED, WAITS };
static s32 run(Launch *l, Warp *w) {
    const Machine *m = l->machine;
    u8 *registers = w->registers;
    for (;; w->at++) {
        const Instruction *i = &m->code[w->at];
        u8 kept[8 * LANES];
        u32 active = ~0u;  // a bit for each lane
        if (i->guard >= 0) {
            active = 0;
            for (s32 lane = 0; lane < LANES; lane++)
                active |= (u32)(!registers[i->guard + lane] == i->negated) << lane;
        }
        #define EACH for (s32 lane = 0; lane < LANES; lane++) if (active >> lane & 1)
        l->steps++;
        switch (i->kind) {
        case PURE:
            if (~active) memcpy(kept, registers + i->operands[0], i->width * LANES);
            HANDLER[i->handler](registers, i->operands);
            for (s32 lane = 0; lane < LANES && ~active; lane++)
                if (!(active >> lane & 1))
                    memcpy(registers + i->operands[0] + lane * i->width, kept + lane * i->width, i->width);
            break;
        case BRANCH:
            if (active && ~active) refuse(l, w, 0, "a divergent branch: lanes of one warp differ");
            if (active) w->at = i->target - 1;
            break;
        case BARRIER:
            if (~active) refuse(l, w, 0, "a divergent barrier: lanes of one warp differ");
            return WAITS;
        case RETURN:
            if (active && ~active) refuse(l, w, 0, "a divergent return: lanes of one warp differ");
            if (active) return ENDED;
            break;
        case LOAD:
            EACH load(l, w, i, lane);
            break;
        case STORE:
            EACH store(l, w, i, lane);
            break;
        case ATOMIC_ADD:
            EACH atomic_add(l, w, i, lane);
            break;
        }
    }
}

static void start(const Launch *l, Program *p, Warp *warps, s32 id) {
    const Machine *m = l->machine;
    s32 *acquired_by = p->acquired_by;
    u8 *shared = p->memory;
    Shadow *shadow = p->shadow;
    memset(acquired_by, 0, m->warps * LANES * sizeof *acquired_by);
    memset(shared, 0xff, m->shared);  // NaN, and no small number
    memset(shadow, 0, m->shared * sizeof *shadow);
    *p = (Program){.id = id, .now = 1, .acquired_by = acquired_by, .memory = shared, .shadow = shadow};
    for (s32 x = 0; x < m->warps; x++) {
        Warp *w = &warps[x];
        w->at = 0;
        memset(w->registers, 0xff, m->registers);
        memcpy(w->registers + m->registers, m->constants, m->file - m->registers);
        u32 *special = (u32 *)(w->registers + m->registers);  // %tid.x, %ctaid.x and %nctaid.x
        for (s32 lane = 0; lane < LANES; lane++) {
            special[lane] = x * LANES + lane;
            special[LANES + lane] = id;
            special[2 * LANES + lane] = m->grid;
        }
    }
}

// A warp waits or ended; the last one of its program lets all go on.
static s32 arrive(Launch *l, Warp *w, s32 waits, Warp **ready, s32 ready_count, Warp *warps) {
    Program *p = w->program;
    s32 all = l->machine->warps;
    if (waits && p->waiting && p->barrier_at != w->at)
        refuse(l, w, 0, "a divergent barrier: other warps wait at another one");
    p->waiting += waits;
    p->ended += !waits;
    if (waits) p->barrier_at = w->at;
    if (p->waiting + p->ended < all || p->ended == all) return ready_count;
    if (p->ended) refuse(l, w, 0, "a divergent barrier: part of the warps ended, others wait");
    p->waiting = 0;
    p->barrier = ++p->now;
    for (s32 t = 0; t < all * LANES; t++)
        if (p->acquired_by[t] > p->acquired) p->acquired = p->acquired_by[t];
    for (s32 x = 0; x < all; x++) {
        warps[x].at++;
        ready[ready_count++] = &warps[x];
    }
    return ready_count;
}

// Run all programs of a launch. Returns how many instructions warps ran, or -1 where `fault` tells what was refused.
s64 launch(const Machine *m, Fault *fault) {
    Launch l = {.machine = m, .random = m->seed | 1, .fault = fault};
    s32 warps = m->warps * m->resident;
    s32 *order = malloc(m->grid * sizeof *order);
    l.last_release = malloc(m->grid * sizeof *l.last_release);
    Program *programs = calloc(m->resident, sizeof *programs);
    Warp *all = calloc(warps, sizeof *all), **ready = malloc(warps * sizeof *ready);
    size_t shadow_bytes = (m->shared + 1) * sizeof(Shadow);
    for (s32 i = 0; i < m->grid; i++) {
        l.last_release[i] = -1;
        s32 j = draw(&l, i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    for (s32 i = 0; i < m->resident; i++) {
        programs[i].acquired_by = malloc(m->warps * LANES * sizeof(s32));
        programs[i].memory = malloc(m->shared + 1);
        programs[i].shadow = malloc(shadow_bytes);
    }
    for (s32 i = 0; i < warps; i++) {
        all[i].index = i % m->warps;
        all[i].program = &programs[i / m->warps];
        all[i].registers = aligned_alloc(64, (m->file + 63) / 64 * 64);
    }
    for (Region *r = m->regions; r < m->regions + m->region_count; r++) {
        size_t size = ((r->end - r->begin) / r->granule + 1) * sizeof(Shadow);
        r->shadow = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (r->shadow == MAP_FAILED) abort();  // only what is touched takes memory
    }
    volatile s64 steps = -1;
    if (!setjmp(l.stop)) {
        s32 next = 0, count = 0;
        for (s32 i = 0; i < m->resident; i++) {
            start(&l, &programs[i], all + i * m->warps, order[next++]);
            for (s32 x = 0; x < m->warps; x++) ready[count++] = &all[i * m->warps + x];
        }
        while (count) {
            s32 chosen = draw(&l, count);
            Warp *w = ready[chosen];
            ready[chosen] = ready[--count];
            Warp *its = w - w->index;
            count = arrive(&l, w, run(&l, w) == WAITS, ready, count, its);
            if (w->program->ended == m->warps && next < m->grid) {
                start(&l, w->program, its, order[next++]);
                for (s32 x = 0; x < m->warps; x++) ready[count++] = &its[x];
            }
        }
        steps = l.steps;
    }
    for (Region *r = m->regions; r < m->regions + m->region_count; r++)
        munmap(r->shadow, ((r->end - r->begin) / r->granule + 1) * sizeof(Shadow));
    for (s32 i = 0; i < warps; i++) free(all[i].registers);
    for (s32 i = 0; i < m->resident; i++) {
        free(programs[i].acquired_by);
        free(programs[i].memory);
        free(programs[i].shadow);
    }
    free(order);
    free(l.last_release);
    free(l.releases);
    free(programs);
    free(all);
    free(ready);
    return steps;
}
