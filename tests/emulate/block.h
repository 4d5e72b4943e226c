// One CUDA block run by fibers: its barriers, its warps' exchanges, and the order in which its threads run. Part of the
// CUDA-on-CPU emulation, see cuda_on_cpu.h.
//
// A thread runs until it waits or returns; then the schedule picks the next one. Nothing orders two threads for
// ThreadSanitizer but __syncthreads and __syncwarp. Shuffles and votes move their values and order no memory, as in
// CUDA.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "fibers.h"

#ifndef EMU_WARP
#define EMU_WARP 32  // 64 for the wavefronts of AMD CDNA
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emu {

constexpr int kWarp = EMU_WARP;
constexpr uint64_t kEveryLane = ~uint64_t(0) >> (64 - kWarp);

enum class Schedule { kInOrder, kReversed, kRandom };
enum class State { kRunnable, kAtBlockBarrier, kAtWarpMeeting, kReturned };

struct Site {
  const char* file = "";
  int line = 0;
};
inline bool same(const Site& a, const Site& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }
inline std::string text(const Site& site) { return std::string(site.file) + ":" + std::to_string(site.line); }

inline uint64_t next_random(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

struct Thread {
  Fiber* fiber = nullptr;
  uint3 index{};
  int lane = 0, warp = 0;
  State state = State::kRunnable;
  Site site;                         // where it waits
  uint64_t mask = 0, offered = 0;    // brought to a warp's meeting
  int source = 0;                    // lane whose value it wants
  uint64_t received = 0, votes = 0;  // taken home; votes: the lanes that offered something other than 0
};

struct Warp {
  uint64_t present = 0, arrived = 0;
  // Two tags by turns, else a slow thread would acquire what a fast one released at the next barrier and no race would
  // ever be reported. Groups of lanes that meet apart are told apart by their lowest lane.
  OrderTag tags[kWarp][2];
  unsigned meetings[kWarp] = {};
};

struct Votes {
  bool all = true, any = false;
  int count = 0;
};

struct Block {
  uint3 index{};
  dim3 shape, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> dynamic_shared;
  size_t dynamic_shared_bytes = 0;
  Schedule schedule = Schedule::kInOrder;
  uint64_t random = 1;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;

  Fiber scheduler;
  std::deque<Fiber> fibers;  // kept from launch to launch
  size_t at_barrier = 0, returned = 0;
  Votes arriving, votes;
  OrderTag start, end, barrier[2];  // barrier: two by turns, as in Warp
  unsigned barriers = 0;
};

inline thread_local Block* block = nullptr;
inline thread_local Thread* thread = nullptr;

EMU_SCHEDULER inline void wait_for_turn() { Fiber::switch_from_to(*thread->fiber, block->scheduler); }

EMU_SCHEDULER inline void thread_main() {
  Block* b = block;
  b->start.acquire();
  b->body(b->argument);
  b->end.release();
  thread->state = State::kReturned;
  b->returned++;
  wait_for_turn();
  die("a thread that had returned was resumed");
}

EMU_SCHEDULER inline void complete_barrier(Block& b) {
  const Site& first = b.threads[0].site;
  for (Thread& t : b.threads) {
    if (t.state == State::kReturned) die("__syncthreads() while some threads of the block have already returned");
    if (!same(t.site, first)) die("divergent __syncthreads(): " + text(first) + " and " + text(t.site));
  }
  for (Thread& t : b.threads) t.state = State::kRunnable;
  b.at_barrier = 0;
  b.votes = b.arriving;
  b.arriving = Votes();
  b.barriers++;
}

EMU_SCHEDULER inline Votes sync_block(Site site, bool vote = false) {
  Block& b = *block;
  OrderTag& tag = b.barrier[b.barriers & 1];
  tag.release();
  thread->state = State::kAtBlockBarrier;
  thread->site = site;
  b.arriving.all &= vote;
  b.arriving.any |= vote;
  b.arriving.count += vote;
  if (++b.at_barrier == b.threads.size()) complete_barrier(b);
  wait_for_turn();
  tag.acquire();
  return b.votes;  // stays until every thread has come to the next barrier
}

// The last lane of the mask to arrive serves them all.
EMU_SCHEDULER inline void complete_meeting(Block& b, Warp& warp, const Thread& last, uint64_t lanes) {
  Thread* first_lane = &b.threads[size_t(last.warp) * kWarp];
  uint64_t votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const Thread& t = first_lane[lane];
    if (!same(t.site, last.site))
      die("lanes of one warp operation meet at different lines: " + text(last.site) + " and " + text(t.site));
    if (t.mask != last.mask) die("lanes of one warp operation name different masks at " + text(t.site));
    if (!(lanes >> t.source & 1))
      die("shuffle reads lane " + std::to_string(t.source) + " outside the mask at " + text(t.site));
    votes |= uint64_t(t.offered != 0) << lane;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    Thread& t = first_lane[lane];
    t.received = first_lane[t.source].offered;
    t.votes = votes;
    t.state = State::kRunnable;
  }
  warp.arrived &= ~lanes;
}

EMU_SCHEDULER inline void meet(uint64_t mask, uint64_t offered, int source, Site site, bool orders_memory) {
  Block& b = *block;
  Thread& t = *thread;
  Warp& warp = b.warps[t.warp];
  const uint64_t lanes = mask & warp.present;
  if (mask & ~kEveryLane) die("warp mask names lanes that do not exist at " + text(site));
  if (!(mask >> t.lane & 1)) die("warp operation by a lane outside its own mask at " + text(site));
  const int group = __builtin_ctzll(lanes);
  OrderTag& tag = warp.tags[group][warp.meetings[group] & 1];
  if (orders_memory) tag.release();
  t.mask = mask;
  t.offered = offered;
  t.source = source;
  t.site = site;
  t.state = State::kAtWarpMeeting;
  warp.arrived |= uint64_t(1) << t.lane;
  if ((warp.arrived & lanes) == lanes) {
    complete_meeting(b, warp, t, lanes);
    warp.meetings[group]++;
  }
  wait_for_turn();
  if (orders_memory) tag.acquire();
}

// Dynamic shared memory is a fresh heap block of the exact size, full of NaN: ASan sees an overrun, a value check sees
// what was never written.
EMU_SCHEDULER inline void prepare_block(Block& b, const uint3& index) {
  const size_t count = size_t(b.shape.x) * b.shape.y * b.shape.z;
  b.index = index;
  b.at_barrier = b.returned = 0;
  b.dynamic_shared.reset(b.dynamic_shared_bytes ? new unsigned char[b.dynamic_shared_bytes] : nullptr);
  if (b.dynamic_shared_bytes) std::memset(b.dynamic_shared.get(), 0xff, b.dynamic_shared_bytes);
  b.warps.assign((count + kWarp - 1) / kWarp, Warp());
  b.threads.resize(count);
  while (b.fibers.size() < count) b.fibers.emplace_back();
  for (size_t i = 0; i < count; ++i) {
    Thread& t = b.threads[i];
    t.index = {unsigned(i % b.shape.x), unsigned(i / b.shape.x % b.shape.y), unsigned(i / b.shape.x / b.shape.y)};
    t.lane = int(i % kWarp);
    t.warp = int(i / kWarp);
    t.state = State::kRunnable;
    b.warps[t.warp].present |= uint64_t(1) << t.lane;
    t.fiber = &b.fibers[i];
    t.fiber->prepare(&thread_main);
  }
}

[[noreturn]] inline void report_deadlock(const Block& b) {
  std::string message = "deadlock in block (" + std::to_string(b.index.x) + "," + std::to_string(b.index.y) + "," +
                        std::to_string(b.index.z) + "):";
  int shown = 0;
  for (size_t i = 0; i < b.threads.size() && shown < 4; ++i) {
    if (b.threads[i].state == State::kReturned) continue;
    message += " thread " + std::to_string(i) + " waits at " + text(b.threads[i].site) + ";";
    ++shown;
  }
  die(message);
}

EMU_SCHEDULER inline void run_block(Block& b, const uint3& index) {
  block = &b;
  b.scheduler.adopt_current();
  prepare_block(b, index);
  b.start.release();
  std::vector<size_t> order(b.threads.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = b.schedule == Schedule::kReversed ? order.size() - 1 - i : i;
  while (b.returned < b.threads.size()) {
    if (b.schedule == Schedule::kRandom)
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random(b.random) % i]);
    bool progress = false;
    for (size_t i : order) {
      if (b.threads[i].state != State::kRunnable) continue;
      progress = true;
      thread = &b.threads[i];
      Fiber::switch_from_to(b.scheduler, *thread->fiber);
    }
    if (b.at_barrier && b.returned && b.at_barrier + b.returned == b.threads.size()) complete_barrier(b);
    if (!progress) report_deadlock(b);
  }
  b.end.acquire();
  thread = nullptr;
  block = nullptr;
}

}  // namespace emu
