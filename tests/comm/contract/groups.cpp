#include "comm/contract.hpp"

#include <latch>
#include <thread>
#include <vector>

namespace dualpipe::contract {

using ::testing::AllOf;
using ::testing::HasSubstr;
using namespace std::chrono_literals;

TEST_P(Contract, ConnectAgreesOnTheEdges) {
  run(3, [](Ptr comm) {
    comm->connect({{0, 1}, {1, 2}});
    comm->connect({{2, 0}, {0, 1}});
    const int next = (comm->rank() + 1) % 3;
    const int previous = (comm->rank() + 2) % 3;
    if (comm->rank() == 0) comm->send(next, {torch::full({1}, 0)});
    EXPECT_TRUE(torch::equal(comm->receive(previous).take().at(0), torch::full({1}, previous)));
    if (comm->rank() != 0) comm->send(next, {torch::full({1}, comm->rank())});
    comm->barrier().wait();
  });
  run(2, [](Ptr comm) {
    const CommError error = comm_error([&] {
      comm->connect(comm->rank() == 0 ? std::vector<Communicator::Edge>{{0, 1}}
                                      : std::vector<Communicator::Edge>{{1, 0}});
    });
    EXPECT_THAT(error.what(), AllOf(HasSubstr("0->1"), HasSubstr("1->0")));
  });
}

TEST_P(Contract, WhatHostsSayToEachOtherIsApart) {
  run(3, [](Ptr comm) {
    Communicator& hosts = comm->control();
    EXPECT_TRUE(hosts.device().is_cpu());
    EXPECT_EQ(hosts.rank(), comm->rank());
    EXPECT_EQ(hosts.size(), comm->size());
    const int r = comm->rank();
    Pending sum = comm->all_reduce({torch::full({2}, r)});
    Pending said = hosts.all_gather(torch::full({1}, 10 + r));
    EXPECT_TRUE(torch::equal(torch::cat(said.take()), torch::tensor({10, 11, 12})));
    EXPECT_TRUE(torch::equal(sum.take().at(0), torch::full({2}, 3)));
    if (r == 0) {
      comm->send(1, {torch::full({1}, 1)});
      hosts.send(1, {torch::full({1}, 2)});
    } else if (r == 1) {
      Pending first = comm->receive(0);
      EXPECT_TRUE(torch::equal(hosts.receive(0).take().at(0), torch::full({1}, 2)));
      EXPECT_TRUE(torch::equal(first.take().at(0), torch::full({1}, 1)));
    }
    comm->barrier().wait();
  });
}

TEST_P(Contract, SplitMakesGroupsOrderedByKeyThenRank) {
  run(5, [](Ptr comm) {
    const int r = comm->rank();
    // Colors 0 (ranks 0, 2, 4) and 7 (1, 3), keys descending and negative.
    const auto group = comm->split(r % 2 == 0 ? 0 : 7, -r);
    ASSERT_NE(group, nullptr);
    EXPECT_EQ(group->size(), r % 2 == 0 ? 3 : 2);
    EXPECT_EQ(group->rank(), (r % 2 == 0 ? 4 - r : 3 - r) / 2);
    const auto ranks = torch::cat(group->all_gather(torch::full({1}, r)).take());
    EXPECT_TRUE(torch::equal(ranks, r % 2 == 0 ? torch::tensor({4, 2, 0}) : torch::tensor({3, 1})));

    // Equal keys: by rank. A negative color takes part and belongs to nothing.
    const auto tail = comm->split(r < 2 ? -3 : 1, 0);
    EXPECT_EQ(tail == nullptr, r < 2);
    if (tail) {
      EXPECT_EQ(tail->rank(), r - 2);
    }

    // Transfers of the groups, of the parent and between the same two ranks in two groups stay apart.
    const auto again = comm->split(0, 0);
    if (r == 2 || r == 4) {
      const int there_in_group = r == 2 ? 0 : 1;
      if (r == 2) {
        group->send(there_in_group, {torch::full({1}, 100)});
        comm->send(4, {torch::full({1}, 200)});
        again->send(4, {torch::full({1}, 300)});
        tail->send(2, {torch::full({1}, 400)});
      } else if (GetParam().asynchronous) {
        EXPECT_TRUE(torch::equal(tail->receive(0).take().at(0), torch::full({1}, 400)));
        EXPECT_TRUE(torch::equal(again->receive(2).take().at(0), torch::full({1}, 300)));
        EXPECT_TRUE(torch::equal(comm->receive(2).take().at(0), torch::full({1}, 200)));
        EXPECT_TRUE(torch::equal(group->receive(there_in_group).take().at(0), torch::full({1}, 100)));
      } else {
        EXPECT_TRUE(torch::equal(group->receive(there_in_group).take().at(0), torch::full({1}, 100)));
        EXPECT_TRUE(torch::equal(comm->receive(2).take().at(0), torch::full({1}, 200)));
        EXPECT_TRUE(torch::equal(again->receive(2).take().at(0), torch::full({1}, 300)));
        EXPECT_TRUE(torch::equal(tail->receive(0).take().at(0), torch::full({1}, 400)));
      }
    }
    comm->barrier().wait();
  });
}

TEST_P(Contract, GroupsSplitAgain) {
  run(4, [](Ptr comm) {
    const int r = comm->rank();
    const auto half = comm->split(r / 2, 0);
    const auto alone = half->split(half->rank(), 0);
    EXPECT_EQ(alone->size(), 1);
    EXPECT_TRUE(torch::equal(alone->all_reduce({torch::full({1}, r)}).take().at(0), torch::full({1}, r)));
    const auto swapped = half->split(0, -half->rank());
    EXPECT_EQ(swapped->rank(), 1 - half->rank());
    const auto diagonal = comm->split(r == 0 || r == 3 ? 1 : 2, 0);
    EXPECT_TRUE(torch::equal(swapped->all_reduce({torch::full({1}, r)}).take().at(0), torch::full({1}, r < 2 ? 1 : 5)));
    EXPECT_TRUE(torch::equal(diagonal->all_reduce({torch::full({1}, r)}).take().at(0), torch::full({1}, 3)));
    comm->barrier().wait();
  });
}

TEST_P(Contract, FamiliesDoNotSeeEachOther) {
  std::latch connected(2);
  std::latch aborted(2);
  std::jthread other([&] {
    run(2, [&](Ptr comm) {
      comm->barrier().wait();
      connected.arrive_and_wait();
      if (comm->rank() == 0) comm->abort("only here");
      EXPECT_THAT(comm_error([&] { comm->receive(1 - comm->rank()).wait(); }).what(), HasSubstr("only here"));
      aborted.count_down();
    });
  });
  run(2, [&](Ptr comm) {
    for (int i = 0; i < 10; ++i) {
      if (i == 5) aborted.wait();
      if (comm->rank() == 0) {
        comm->send(1, {torch::full({1}, i)});
      } else {
        EXPECT_TRUE(torch::equal(comm->receive(0).take().at(0), torch::full({1}, i)));
      }
      EXPECT_TRUE(torch::equal(comm->all_reduce({torch::ones({1})}).take().at(0), torch::full({1}, 2.0f)));
    }
  });
}

}  // namespace dualpipe::contract
