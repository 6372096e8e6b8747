#include "comm/contract.hpp"

#include <functional>
#include <random>
#include <vector>

namespace dualpipe::contract {

using namespace std::chrono_literals;

TEST_P(Contract, RandomProgramsDeliverTheRightValues) {
  constexpr at::ScalarType dtypes[] = {at::kFloat, at::kDouble, at::kLong, at::kBFloat16};
  for (const unsigned seed : {1u, 2u, 3u}) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    const int size = 2 + static_cast<int>(seed);
    run(size, [&](Ptr comm) {
      std::mt19937 program(seed);                                           // the same on all ranks
      std::mt19937 own(1000 * seed + static_cast<unsigned>(comm->rank()));  // when this rank waits
      const auto pick = [](std::mt19937& random, int below) {
        return static_cast<int>(random() % static_cast<unsigned>(below));
      };
      const int me = comm->rank();
      struct Open {
        Pending pending;
        std::function<void(const Tensors&)> check;
      };
      std::vector<Open> open;
      const auto close = [&](std::size_t i) {
        open[i].check(open[i].pending.take());
        open.erase(open.begin() + static_cast<std::ptrdiff_t>(i));
      };
      for (int step = 0; step < 150; ++step) {
        const int kind = pick(program, 8);
        const auto dtype = dtypes[pick(program, 4)];
        const std::vector<std::int64_t> sizes = {pick(program, 40), 1 + pick(program, 50)};
        const int a = pick(program, size);
        const int b = (a + 1 + pick(program, size - 1)) % size;
        const auto value = [=](int rank) { return pattern(sizes, 31 * step + 7 * rank, dtype); };
        if (kind < 4) {  // a transfer
          if (me == a) {
            open.push_back({comm->send(b, {value(a), value(b)}), [](const Tensors& got) { EXPECT_TRUE(got.empty()); }});
          } else if (me == b) {
            std::optional<Expected> expected;
            if (kind == 0) expected = signature_of({value(a), value(b)});
            open.push_back({comm->receive(a, expected), [=](const Tensors& got) {
                              ASSERT_EQ(got.size(), 2u);
                              EXPECT_TRUE(same_bits(got[0], value(a)) && same_bits(got[1], value(b)))
                                  << "step " << step;
                            }});
          }
        } else if (kind == 4) {
          open.push_back({comm->all_reduce({value(me)}, Reduce::max), [=](const Tensors& got) {
                            auto expected = value(0);
                            for (int r = 1; r < size; ++r) expected = torch::maximum(expected, value(r));
                            EXPECT_TRUE(same_bits(got.at(0), expected)) << "step " << step;
                          }});
        } else if (kind == 5) {
          open.push_back({comm->broadcast({value(me)}, a),
                          [=](const Tensors& got) { EXPECT_TRUE(same_bits(got.at(0), value(a))) << "step " << step; }});
        } else if (kind == 6) {
          std::optional<Signature> expected;
          if (pick(own, 2) == 0) expected = Signature(static_cast<std::size_t>(size), signature_of({value(0)}).front());
          open.push_back({comm->all_gather(value(me), expected), [=](const Tensors& got) {
                            for (int r = 0; r < size; ++r) {
                              EXPECT_TRUE(same_bits(got.at(static_cast<std::size_t>(r)), value(r))) << "step " << step;
                            }
                          }});
        } else {
          Tensors outgoing;
          for (int r = 0; r < size; ++r) outgoing.push_back(value(me).add(r));
          open.push_back({comm->all_to_all(std::move(outgoing)), [=](const Tensors& got) {
                            for (int r = 0; r < size; ++r) {
                              EXPECT_TRUE(same_bits(got.at(static_cast<std::size_t>(r)), value(r).add(me)))
                                  << "step " << step;
                            }
                          }});
        }
        // A transfer may be waited for as soon as its other end has been issued, which the order of the program
        // guarantees.
        while (!open.empty() && (open.size() > 12 || pick(own, 3) == 0))
          close(static_cast<std::size_t>(pick(own, static_cast<int>(open.size()))));
      }
      while (!open.empty()) close(open.size() - 1);
    });
  }
}

}  // namespace dualpipe::contract
