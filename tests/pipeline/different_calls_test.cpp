// Ranks that do different things are found when they meet, and told both calls.
#include <ATen/CPUGeneratorImpl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/detail/pipeline/call_statement.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::Each;
using ::testing::HasSubstr;
using Call = std::function<void(DualPipe&)>;

constexpr int kOdd = 2;  // the rank that does something else

DualPipe pipe_of(const std::shared_ptr<Communicator>& comm) {
  return DualPipe(comm, DualPipeOptions{.num_micro_batches = 8}, as_factory(layer));
}

const std::map<std::string, Call>& calls() {
  static const std::map<std::string, Call> all = {
      {"step()", [](DualPipe& pipe) { pipe->step(random_batch(16, 3), squared_error()); }},
      {"evaluate()", [](DualPipe& pipe) { pipe->evaluate(random_batch(16, 3), squared_error()); }},
      {"predict()", [](DualPipe& pipe) { pipe->predict(random_batch(16, 3)); }},
      {"clip_grad_norm_()", [](DualPipe& pipe) { pipe->clip_grad_norm_(1.0); }},
      {"broadcast_parameters()", [](DualPipe& pipe) { pipe->broadcast_parameters(); }},
  };
  return all;
}

TEST(DifferentCalls, AreNamedOnAllRanksAndThePipelineGoesOn) {
  const Batch batch = random_batch(16, 3);
  const Reference expected = reference(layer, kRanks, batch, 8, squared_error(), 1.0 / 8);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe = pipe_of(comm);
    pipe->step(batch, squared_error());
    for (const auto& [most, call] : calls())
      for (const auto& [odd, other] : calls()) {
        if (most == odd) continue;
        for (const int rank : {0, kOdd}) {
          SCOPED_TRACE(most + " " + odd);
          const Call& mine = comm->rank() == rank ? other : call;
          std::string text;
          try {
            mine(pipe);
          } catch (const InvalidArgument& error) {
            text = error.what();
          }
          EXPECT_THAT(text, HasSubstr("ranks call different methods: rank 0 calls " + (rank == 0 ? odd : most)));
          EXPECT_THAT(text, HasSubstr(rank == 0 ? "rank 1 calls " + most : "rank 2 calls " + odd));
        }
      }
    pipe->step(batch, squared_error());
    expect_gradients(pipe, expected, 1e-12, 2);
  });
}

/// What the ranks throw when `body` runs on each, by rank.
std::vector<std::string> errors_of_ranks(const std::function<void(std::shared_ptr<Communicator>)>& body) {
  std::vector<std::string> texts(kRanks);
  run_ranks(kRanks, [&](std::shared_ptr<Communicator> comm) {
    const int rank = comm->rank();
    texts[rank] = message_of([&] { body(std::move(comm)); });
  });
  return texts;
}

TEST(DifferentCalls, ARankThatHasLeftItsLoopIsNamedBesideTheCall) {
  for (const auto& [name, call] : calls()) {
    SCOPED_TRACE(name);
    auto texts = errors_of_ranks([&](std::shared_ptr<Communicator> comm) {
      DualPipe pipe = pipe_of(comm);
      pipe->step(random_batch(16, 3), squared_error());
      if (comm->rank() == kOdd) return;
      comm.reset();
      call(pipe);
    });
    EXPECT_EQ(texts[kOdd], "");
    texts.erase(texts.begin() + kOdd);
    EXPECT_THAT(texts, Each(AllOf(HasSubstr("rank 2 has left"), HasSubstr("this rank had called " + name))));
  }
}

TEST(DifferentCalls, ARankThatMakesAPipelineIsToldSo) {
  const auto texts = errors_of_ranks([&](std::shared_ptr<Communicator> comm) {
    DualPipe pipe = pipe_of(comm);
    pipe->step(random_batch(16, 3), squared_error());  // all are through the constructor
    if (comm->rank() == kOdd) {
      DualPipe another = pipe_of(comm);
    } else {
      pipe->step(random_batch(16, 3), squared_error());
    }
  });
  EXPECT_THAT(texts[kOdd], AnyOf(HasSubstr("rank 0 has called something else, as step()"), HasSubstr("calls step()")));
  // The first to see it tells the others.
  for (const int rank : {0, 1, 3})
    EXPECT_THAT(texts[rank], AnyOf(HasSubstr("calls step(), but rank 2 does something else"),
                                   HasSubstr("has called something else, as step()")));
}

TEST(DifferentCalls, ARankThatUsesTheCommunicatorItselfIsToldSo) {
  std::vector<std::pair<std::string, std::function<void(Communicator&)>>> uses = {
      {"barrier", [](Communicator& comm) { comm.barrier().wait(); }},
      {"all_reduce(sum)", [](Communicator& comm) { comm.all_reduce({torch::zeros({2})}).wait(); }},
      {"something else with the communicator", [](Communicator& comm) { comm.all_gather(torch::zeros({2})).wait(); }},
      {"something else with the communicator",
       [](Communicator& comm) { comm.all_gather(torch::zeros({2}, torch::kLong)).wait(); }},
  };
  // Numbers as a call sends them, that mean nothing or that begin alike.
  const auto counts = [](std::int64_t parameters, std::int64_t weights) {
    torch::Tensor numbers = torch::zeros({32}, torch::kLong);
    numbers[0] = detail::CallStatement::mark;
    numbers[16] = parameters;
    numbers[17] = weights;
    return numbers;
  };
  constexpr std::int64_t many = std::int64_t{1} << 62;
  const torch::Tensor random =
      torch::randint(0, 30000, {512}, at::make_generator<at::CPUGeneratorImpl>(7), torch::kLong);
  for (const torch::Tensor& numbers :
       {torch::full({15}, 50000, torch::kLong), torch::full({64}, 50000, torch::kLong),
        torch::zeros({64}, torch::kLong), torch::ones({64}, torch::kLong), torch::ones({1}, torch::kLong).expand({64}),
        torch::full({64}, detail::CallStatement::mark, torch::kLong), counts(many, 0), counts(-1, 0), counts(0, many),
        counts(0, -1), counts(0, 15), random})
    uses.emplace_back("calls step(), but rank 2 does something else with the communicator",
                      [numbers](Communicator& comm) { comm.all_gather(numbers).wait(); });
  for (const auto& [name, use] : uses) {
    SCOPED_TRACE(name);
    auto texts = errors_of_ranks([&](std::shared_ptr<Communicator> comm) {
      DualPipe pipe = pipe_of(comm);
      pipe->step(random_batch(16, 3), squared_error());  // all are through the constructor
      if (comm->rank() == kOdd) {
        use(*comm);
      } else {
        pipe->step(random_batch(16, 3), squared_error());
      }
    });
    texts.erase(texts.begin() + kOdd);
    EXPECT_THAT(texts, Each(AllOf(HasSubstr(name), HasSubstr("step()"))));
  }
}

}  // namespace
}  // namespace dualpipe::test
