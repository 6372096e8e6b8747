#include <gmock/gmock.h>
#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <latch>
#include <map>
#include <mutex>
#include <set>

#include "emulated_rank.hpp"
#include "forwarding.hpp"

// Streams that lag behind the host: a missing wait, a tensor freed early or a different order of transfers gives wrong
// values or a deadlock. Mutants prove it.
namespace dualpipe::test {
namespace {

using ::testing::HasSubstr;
using namespace std::chrono_literals;
using Forgets = ForgetfulDevice::Forgets;

constexpr int num_rounds = 8;
constexpr std::int64_t num_elements = 3000;

/// How a mutant differs.
struct Mutation {
  bool frees_early = false;  ///< rank 1 frees the memory of its sends at once
  bool reorders = false;     ///< rank 1 receives the next value from rank 0 before it sends the last one back
};

float value_of(int round, std::int64_t i) { return static_cast<float>(1000 * round + i % 100); }

/// Three ranks pass values on in both directions, rank 1 adding one: 0 -> 1 -> 2 and 2 -> 1 -> 0. Kernels make, change
/// and check each value; its memory is freed as soon as the kernel is launched.
class Relay {
 public:
  explicit Relay(Mutation mutation = {}) : mutation_(mutation) {}

  void operator()(const EmulatedRank& emulated) {
    const AsyncRank rank(emulated);
    rank->connect({{0, 1}, {1, 0}, {1, 2}, {2, 1}});
    std::vector<Pending> sends;
    at::Tensor forward, backward;
    const auto receive = [&](int from) { return rank->receive(from); };
    for (int round = 0; round < num_rounds; ++round) {
      // The global order of a round: 0 -> 1, 2 -> 1, 1 -> 2, 1 -> 0.
      if (rank.rank() != 1) {
        at::Tensor made = rank.empty({num_elements});
        rank.run(slow_fill(made, [round](std::int64_t i) { return value_of(round, i); }, 300us));
        sends.push_back(rank->send(1, {std::move(made)}));
        keep(rank, rank->receive(1).take().at(0), round);
      } else {
        Pending from_first = ahead_ ? std::exchange(ahead_, {}) : receive(0);
        Pending from_last = receive(2);
        send_changed(rank, 2, from_first.take().at(0), sends);
        at::Tensor back = from_last.take().at(0);
        if (mutation_.reorders && round + 1 < num_rounds) ahead_ = receive(0);
        send_changed(rank, 0, std::move(back), sends);
      }
      while (sends.size() > 2) {
        sends.front().wait();
        sends.erase(sends.begin());
      }
    }
    for (Pending& send : sends) send.wait();
    rank.synchronize();
    rank->barrier().wait();
  }

  /// Number of wrong values at the ends.
  int wrong_values() const { return wrong_; }

 private:
  void send_changed(const AsyncRank& rank, int to, at::Tensor got, std::vector<Pending>& sends) {
    at::Tensor changed = rank.empty({num_elements});
    float* const memory = changed.mutable_data_ptr<float>();
    rank.run([got = std::move(got), into = memory] {
      std::this_thread::sleep_for(300us);
      const float* from = got.const_data_ptr<float>();
      for (std::int64_t i = 0; i < num_elements; ++i) into[i] = from[i] + 1;
    });
    if (mutation_.frees_early) {
      sends.push_back(rank->send(to, {at::from_blob(memory, {num_elements})}));
    } else {
      sends.push_back(rank->send(to, {std::move(changed)}));
    }
  }
  void keep(const AsyncRank& rank, at::Tensor got, int round) {
    rank.run([this, got = std::move(got), round] {
      std::this_thread::sleep_for(100us);
      const float* data = got.const_data_ptr<float>();
      for (std::int64_t i = 0; i < num_elements; ++i)
        if (data[i] != value_of(round, i) + 1) ++wrong_;
    });
  }

  const Mutation mutation_;
  Pending ahead_;  // of rank 1
  std::atomic<int> wrong_{0};
};

int wrong_values(std::uint64_t seed, Mutation mutation = {}, const Decorate& decorate = nullptr,
                 detail::NcclCommunicatorOptions options = {.timeout = 20s}) {
  const bool mutant = mutation.frees_early || decorate;
  const testing::NcclEmulation emulation(3, {.seed = seed, .longest_delay = mutant ? 2000us : 100us});
  Relay relay(mutation);
  run_emulated(emulation, 3, options, std::ref(relay), decorate);
  expect_clean(emulation);
  return relay.wrong_values();
}

/// Mutants race on purpose, which ThreadSanitizer reports.
bool races_are_errors() {
#ifdef __SANITIZE_THREAD__
  return true;
#else
  return false;
#endif
}

TEST(Ordering, EventsAloneMakeTheProgramRight) {
  for (std::uint64_t seed = 1; seed <= 10; ++seed) EXPECT_EQ(wrong_values(seed), 0) << "seed " << seed;
}

TEST(Ordering, SoTheyDoWithACommunicatorPerEdge) {
  for (std::uint64_t seed = 1; seed <= 10; ++seed)
    EXPECT_EQ(wrong_values(seed, {}, nullptr, {.timeout = 20s, .communicator_per_edge = true}), 0) << "seed " << seed;
}

TEST(Ordering, SoTheyDoWhenBothEndsStartTogether) {
  for (std::uint64_t seed = 1; seed <= 10; ++seed)
    EXPECT_EQ(wrong_values(seed, {}, nullptr,
                           {.timeout = 20s, .communicator_per_edge = seed % 2 == 0, .start_when_both_ready = true}),
              0)
        << "seed " << seed;
}

class Mutants : public ::testing::Test {
 protected:
  void SetUp() override {
    if (races_are_errors()) GTEST_SKIP() << "data races are the point";
  }
};

Decorate forgetful(int on_rank, Forgets forgets) {
  return [=](int rank, std::shared_ptr<detail::DeviceApi>& device, std::shared_ptr<detail::NcclApi>&) {
    if (rank == on_rank) device = std::make_shared<ForgetfulDevice>(device, forgets);
  };
}

TEST_F(Mutants, ASendThatDoesNotWaitForItsProducerIsCaught) {
  EXPECT_GT(wrong_values(1, {}, forgetful(0, Forgets::to_wait_for_the_caller)), 0);
  EXPECT_GT(wrong_values(2, {}, forgetful(1, Forgets::to_wait_for_the_caller)), 0);
}

TEST_F(Mutants, AConsumerThatDoesNotWaitForItsTransferIsCaught) {
  EXPECT_GT(wrong_values(1, {}, forgetful(1, Forgets::to_wait_for_the_transfer)), 0);
  EXPECT_GT(wrong_values(2, {}, forgetful(2, Forgets::to_wait_for_the_transfer)), 0);
}

TEST_F(Mutants, ATensorFreedEarlyIsCaught) { EXPECT_GT(wrong_values(1, {.frees_early = true}), 0); }

TEST_F(Mutants, TwoTransfersReorderedOnOneRankAreCaught) {
  try {
    (void)wrong_values(1, {.reorders = true}, nullptr, {.timeout = 300ms});
    ADD_FAILURE() << "no deadlock";
  } catch (const CommError& error) {
    EXPECT_THAT(error.what(), HasSubstr("longer than the timeout of 300 ms"));
  }
}

/// A kernel that uses the receive's memory has not run yet when the transfer could begin.
int spoiled_by_a_receive(const Decorate& decorate) {
  const testing::NcclEmulation emulation(2);
  std::atomic<int> spoiled{0};
  run_emulated(
      emulation, 2, {.timeout = 20s},
      [&](const EmulatedRank& emulated) {
        const AsyncRank rank(emulated);
        rank->connect({{0, 1}});
        if (rank.rank() == 0) {
          at::Tensor made = rank.empty({num_elements});
          rank.run(slow_fill(made, [](std::int64_t) { return 2.0f; }, 0us));
          rank->send(1, {std::move(made)}).wait();
        } else {
          at::Tensor used = rank.empty({num_elements});
          const float* memory = used.const_data_ptr<float>();
          rank.run(
              [&spoiled, into = used.mutable_data_ptr<float>()] {  // in the stream's order, before it is given back
                std::fill(into, into + num_elements, 1.0f);
                for (int look = 0; look < 20; ++look) {
                  std::this_thread::sleep_for(1ms);
                  for (std::int64_t i = 0; i < num_elements; ++i)
                    if (into[i] != 1.0f) ++spoiled;
                }
              });
          used.reset();
          Pending received = rank->receive(0);
          const at::Tensor got = received.take().at(0);
          EXPECT_EQ(got.const_data_ptr<float>(), memory) << "the test needs the allocator to give the memory out again";
          rank.run([got, &spoiled] {
            for (std::int64_t i = 0; i < num_elements; ++i)
              if (got.const_data_ptr<float>()[i] != 2.0f) ++spoiled;
          });
        }
        rank.synchronize();
        rank->barrier().wait();
      },
      decorate);
  return spoiled;
}

TEST(Ordering, AReceiveWaitsForWhoUsedItsMemoryBefore) { EXPECT_EQ(spoiled_by_a_receive(nullptr), 0); }

TEST_F(Mutants, AReceiveThatDoesNotWaitForItsMemoryIsCaught) {
  EXPECT_GT(spoiled_by_a_receive(forgetful(1, Forgets::to_wait_for_the_caller)), 0);
}

TEST(Ordering, AnySizesGoThroughInTheGlobalOrderOneTransferAtATime) {
  // Sizes above and below those that NCCL buffers.
  const testing::NcclEmulation emulation(2, {.seed = 3, .one_transfer_at_a_time = true});
  run_emulated(emulation, 2, {.timeout = 20s}, [&](const EmulatedRank& emulated) {
    const AsyncRank rank(emulated);
    rank->connect({{0, 1}, {1, 0}});
    const std::vector<std::int64_t> sizes = {1, 1 << 20, 5, 4 << 20, 1 << 10};
    std::vector<Pending> sends;
    for (std::size_t k = 0; k < 2 * sizes.size(); ++k) {
      const std::int64_t size = sizes[k % sizes.size()];
      const int from = static_cast<int>(k % 2);
      if (rank.rank() == from) {
        at::Tensor made = rank.empty({size});
        rank.run(slow_fill(made, [k](std::int64_t i) { return value_of(static_cast<int>(k), i); }, 0us));
        sends.push_back(rank->send(1 - from, {std::move(made)}));
      } else {
        const at::Tensor got = rank->receive(from).take().at(0);
        rank.run([got, k] {
          for (std::int64_t i = 0; i < got.numel(); i += 97)
            ASSERT_EQ(got.const_data_ptr<float>()[i], value_of(static_cast<int>(k), i));
        });
      }
    }
    for (Pending& send : sends) send.wait();
    rank.synchronize();
    rank->barrier().wait();
  });
  expect_clean(emulation);
}

// ---------------------------------------------------------------------------------------------------------------------
// transfers whose ends start together

/// Rank 1 receives long before rank 0's device comes to its send. How many kernels of rank 1 have begun meanwhile beside
/// a transfer that waits; looks for one as long as `limit`.
int kernels_beside_a_receive(bool start_when_both_ready, std::chrono::milliseconds limit,
                             const Decorate& decorate = nullptr) {
  const testing::NcclEmulation emulation(2);
  std::latch computed(1);
  int found = 0;
  run_emulated(
      emulation, 2, {.timeout = 30s, .start_when_both_ready = start_when_both_ready},
      [&](const EmulatedRank& emulated) {
        const AsyncRank rank(emulated);
        rank->connect({{0, 1}});
        if (rank.rank() == 0) {
          at::Tensor made = rank.empty({num_elements});
          rank.run([&computed] { computed.wait(); });
          rank->send(1, {std::move(made)}).wait();
        } else {
          Pending received = rank->receive(0);
          for (const auto end = std::chrono::steady_clock::now() + limit;
               found == 0 && std::chrono::steady_clock::now() < end;) {
            (void)received.done();  // launches it when its header has come
            rank.run([] { std::this_thread::sleep_for(1ms); });
            rank.synchronize();
            found = emulation.kernels_beside_waiting(1);
          }
          computed.count_down();
          received.wait();
        }
        rank.synchronize();
        rank->barrier().wait();
      },
      decorate);
  expect_clean(emulation);
  return found;
}

TEST(BothReady, NoReceiveOccupiesItsDeviceUntilTheSenderComes) {
  EXPECT_GT(kernels_beside_a_receive(false, 10s), 0);
  EXPECT_EQ(kernels_beside_a_receive(true, 200ms), 0);
}

/// A device that gets the flags of transfers wrong.
class WrongFlags final : public ForwardingDevice {
 public:
  enum class Mistake { no_wait, written_too_early };
  WrongFlags(std::shared_ptr<detail::DeviceApi> inner, Mistake mistake)
      : ForwardingDevice(std::move(inner)), mistake_(mistake) {}
  void write_flag(detail::DeviceStream stream, detail::DeviceFlag& flag, std::uint32_t value) override {
    if (mistake_ == Mistake::written_too_early) {
      flag = value;
    } else {
      inner_->write_flag(stream, flag, value);
    }
  }
  void wait_for_flag(detail::DeviceStream stream, const detail::DeviceFlag& flag, std::uint32_t value) override {
    if (mistake_ != Mistake::no_wait) inner_->wait_for_flag(stream, flag, value);
  }

 private:
  const Mistake mistake_;
};

TEST(BothReady, AStreamThatDoesNotWaitAndAFlagWrittenTooEarlyAreCaught) {
  using Mistake = WrongFlags::Mistake;
  const auto with = [](int on_rank, Mistake mistake) -> Decorate {
    return [=](int rank, std::shared_ptr<detail::DeviceApi>& device, std::shared_ptr<detail::NcclApi>&) {
      if (rank == on_rank) device = std::make_shared<WrongFlags>(device, mistake);
    };
  };
  EXPECT_GT(kernels_beside_a_receive(true, 10s, with(1, Mistake::no_wait)), 0);
  EXPECT_GT(kernels_beside_a_receive(true, 10s, with(0, Mistake::written_too_early)), 0);
}

/// Receives one value, so that the signature is known, then launches a second receive.
Pending launched_ahead(const AsyncRank& rank) {
  const Expected expected(Signature{{.dtype = at::kFloat, .sizes = {num_elements}}}, "");
  rank->receive(0, expected).wait();
  return rank->receive(0, expected);
}

void send_one(const AsyncRank& rank, float value) {
  at::Tensor made = rank.empty({num_elements});
  rank.run(slow_fill(made, [value](std::int64_t) { return value; }, 0us));
  rank->send(1, {std::move(made)}).wait();
}

/// Ignores that flags are released.
class DeafDevice final : public ForwardingDevice {
 public:
  DeafDevice(std::shared_ptr<detail::DeviceApi> inner, const testing::NcclEmulation& emulation,
             std::atomic<bool>& let_go)
      : ForwardingDevice(std::move(inner)), emulation_(emulation), let_go_(let_go) {}
  void wait_for_flag(detail::DeviceStream stream, const detail::DeviceFlag& flag, std::uint32_t value) override {
    emulation_.run(stream, [&flag, &let_go = let_go_, value] {
      while (flag - value > 1000 && !let_go) std::this_thread::sleep_for(1ms);
    });
  }

 private:
  const testing::NcclEmulation& emulation_;
  std::atomic<bool>& let_go_;
};

/// Rank 1's device waits for rank 0's, which fails. What the emulation finds wrong.
std::vector<std::string> violations_of_an_abort(bool deaf) {
  const testing::NcclEmulation emulation(2, {.patience = deaf ? 3s : 60s});
  std::atomic<bool> let_go{false};
  run_emulated(
      emulation, 2, {.timeout = 30s, .start_when_both_ready = true},
      [&](const EmulatedRank& emulated) {
        const AsyncRank rank(emulated);
        rank->connect({{0, 1}});
        if (rank.rank() == 0) {
          send_one(rank, 1);
          rank->commit("");  // unlike a barrier it is over on both before the abort
          rank->abort("the test wants it so");
          for (int i = 0; deaf && i < 1000 && emulation.violations().empty(); ++i) std::this_thread::sleep_for(10ms);
          let_go = true;
        } else {
          Pending second = launched_ahead(rank);
          rank->commit("");
          EXPECT_THROW(second.synchronize(), CommError);
          rank.synchronize();
        }
        EXPECT_THROW(rank->barrier().wait(), CommError);
      },
      [&](int rank, std::shared_ptr<detail::DeviceApi>& device, std::shared_ptr<detail::NcclApi>&) {
        if (rank == 1 && deaf) device = std::make_shared<DeafDevice>(device, emulation, let_go);
      });
  EXPECT_EQ(emulation.open_streams(), 0U);
  return emulation.violations();
}

TEST(BothReady, AnAbortReleasesStreamsThatWait) {
  EXPECT_THAT(violations_of_an_abort(false), ::testing::IsEmpty());
  EXPECT_THAT(violations_of_an_abort(true), ::testing::Contains(HasSubstr("abort hangs")));
}

TEST(BothReady, AHostThatWaitsForItsDeviceHoldsUpNoTransfer) {
  const testing::NcclEmulation emulation(2);
  run_emulated(emulation, 2, {.timeout = 30s, .start_when_both_ready = true}, [&](const EmulatedRank& emulated) {
    const AsyncRank rank(emulated);
    rank->connect({{0, 1}});
    if (rank.rank() == 0) {
      send_one(rank, 1);
      rank->barrier().wait();
      std::this_thread::sleep_for(20ms);
      send_one(rank, 2);
    } else {
      Pending second = launched_ahead(rank);
      rank->barrier().wait();
      emulation.load_code(1);
      const at::Tensor got = second.take().at(0);
      rank.run([got] { EXPECT_EQ(got.const_data_ptr<float>()[num_elements - 1], 2.0F); });
    }
    rank.synchronize();
    rank->barrier().wait();
  });
  expect_clean(emulation);
}

// ---------------------------------------------------------------------------------------------------------------------
// operations that are waited for on another stream than they were called on

float value_between(int from, int to) { return static_cast<float>(10 * from + to + 1); }

/// A second stream of a rank.
class SideStream {
 public:
  explicit SideStream(const EmulatedRank& rank) : rank_(rank), stream_(rank.device->create_stream()) {}
  ~SideStream() {
    rank_.emulation.synchronize(stream_);
    rank_.device->destroy(stream_);
  }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  detail::DeviceStream get() const { return stream_; }
  void run(std::function<void()> kernel) const { rank_.emulation.run(stream_, std::move(kernel)); }
  void synchronize() const { rank_.emulation.synchronize(stream_); }
  template <class Call>
  auto while_current(const AsyncRank& rank, const Call& call) const {
    rank_.emulation.set_current(rank.rank(), stream_);
    auto result = call();
    rank_.emulation.set_current(rank.rank(), rank.stream());
    return result;
  }

 private:
  EmulatedRank rank_;
  detail::DeviceStream stream_;
};

/// The sent values are still being computed when the other stream waits, and freed memory is written to at once.
int wrong_values_of_all_to_all(Communicator& group, const AsyncRank& rank, const SideStream& side) {
  std::atomic<int> wrong{0};
  const int me = group.rank();
  for (int round = 0; round < 5; ++round) {
    Tensors outgoing;
    for (int to = 0; to < group.size(); ++to) {
      outgoing.push_back(rank.empty({num_elements}));
      rank.run(slow_fill(outgoing.back(), [=](std::int64_t) { return value_between(me, to); }, 500us));
    }
    Pending mixed = group.all_to_all(std::move(outgoing));
    const Tensors got = side.while_current(rank, [&] { return mixed.take(); });
    for (int i = 0; i < 3 * group.size(); ++i) {
      const at::Tensor again = rank.empty({num_elements});
      rank.run(slow_fill(again, [](std::int64_t) { return -1.0F; }, 0us));
    }
    side.run([&wrong, got, me] {
      std::this_thread::sleep_for(300us);
      for (std::size_t from = 0; from < got.size(); ++from)
        for (std::int64_t i = 0; i < num_elements; ++i)
          if (got[from].const_data_ptr<float>()[i] != value_between(static_cast<int>(from), me)) ++wrong;
    });
    side.synchronize();
  }
  return wrong;
}

TEST(TwoStreams, AllToAllIsInOrderWithBoth) {
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    const testing::NcclEmulation emulation(2, {.seed = seed});
    run_emulated(emulation, 2, {.timeout = 20s}, [&](const EmulatedRank& emulated) {
      const AsyncRank rank(emulated);
      const SideStream side(emulated);
      EXPECT_EQ(wrong_values_of_all_to_all(*rank, rank, side), 0) << "seed " << seed;
      rank->barrier().wait();
    });
    expect_clean(emulation);
  }
}

TEST(TwoStreams, SoItIsInAGroupOfOne) {
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    const testing::NcclEmulation emulation(2, {.seed = seed});
    run_emulated(emulation, 2, {.timeout = 20s}, [&](const EmulatedRank& emulated) {
      const AsyncRank rank(emulated);
      const SideStream side(emulated);
      const auto alone = rank->split(rank.rank(), 0);
      EXPECT_EQ(wrong_values_of_all_to_all(*alone, rank, side), 0) << "seed " << seed;
      rank->barrier().wait();
    });
    expect_clean(emulation);
  }
}

/// Records which stream has waited for which.
class OrderedDevice final : public ForwardingDevice {
 public:
  using ForwardingDevice::ForwardingDevice;
  void record(detail::DeviceEvent event, detail::DeviceStream stream) override {
    inner_->record(event, stream);
    const std::lock_guard lock(mutex_);
    recorded_[event] = stream;
  }
  void wait(detail::DeviceStream stream, detail::DeviceEvent event) override {
    inner_->wait(stream, event);
    const std::lock_guard lock(mutex_);
    waited_.insert({stream, recorded_.at(event)});
  }
  bool has_waited(detail::DeviceStream stream, detail::DeviceStream for_stream) const {
    const std::lock_guard lock(mutex_);
    return waited_.contains({stream, for_stream});
  }

 private:
  mutable std::mutex mutex_;
  std::map<detail::DeviceEvent, detail::DeviceStream> recorded_;
  std::set<std::pair<detail::DeviceStream, detail::DeviceStream>> waited_;
};

// The host copies strided tensors at once, so that only the order of streams can be checked.
TEST(TwoStreams, TheCopyBackOfAStridedTensorIsInOrderWithBoth) {
  const testing::NcclEmulation emulation(2);
  std::array<std::shared_ptr<OrderedDevice>, 2> devices;
  run_emulated(
      emulation, 2, {.timeout = 20s},
      [&](const EmulatedRank& emulated) {
        const AsyncRank rank(emulated);
        const SideStream side(emulated);
        const at::Tensor strided = torch::ones({30, 20}).t();
        Pending sum = rank->all_reduce({strided});
        while (!sum.done()) std::this_thread::sleep_for(100us);
        side.while_current(rank, [&] { return sum.take(); });
        EXPECT_TRUE((strided == 2).all().item<bool>());
        const OrderedDevice& device = *devices.at(static_cast<std::size_t>(rank.rank()));
        EXPECT_TRUE(device.has_waited(side.get(), rank.stream())) << "for what the tensor was";
        EXPECT_TRUE(device.has_waited(rank.stream(), side.get())) << "for the copy";
        rank->barrier().wait();
      },
      [&](int rank, std::shared_ptr<detail::DeviceApi>& device, std::shared_ptr<detail::NcclApi>&) {
        device = devices.at(static_cast<std::size_t>(rank)) = std::make_shared<OrderedDevice>(device);
      });
  expect_clean(emulation);
}

}  // namespace
}  // namespace dualpipe::test
