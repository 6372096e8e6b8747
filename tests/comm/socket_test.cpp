#include "dualpipe/comm/socket.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <torch/torch.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <latch>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <thread>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include "comm/contract.hpp"
#include "launch/process.hpp"
#include "socket/connect.hpp"
#include "socket/host.hpp"
#include "socket/wire.hpp"

namespace dualpipe {
namespace {

using namespace std::chrono_literals;
using detail::Route;
using dualpipe::testing::Process;
using ::testing::AllOf;
using ::testing::HasSubstr;
using Ptr = std::shared_ptr<Communicator>;
using StorePtr = c10::intrusive_ptr<c10d::Store>;

World world_of(int rank, int size) {
  World world;
  world.rank = world.local_rank = rank;
  world.size = world.local_size = size;
  return world;
}

contract::BackEnd sockets(const std::string& name, Route route) {
  const auto run = [route](int num_ranks, std::chrono::milliseconds timeout, const contract::Body& body) {
    const StorePtr store = c10::make_intrusive<c10d::HashStore>();
    const auto connect = [&](int rank) {
      ConnectOptions options;
      options.timeout = timeout;
      options.store = store;
      return detail::connect_sockets(world_of(rank, num_ranks), options, route);
    };
    contract::run_connected(num_ranks, connect, body);
  };
  return {.name = name, .run = run, .exact_clock = route == Route::best};
}

}  // namespace

namespace contract {
INSTANTIATE_TEST_SUITE_P(Sockets, Contract, ::testing::Values(sockets("Unix", Route::best), sockets("Tcp", Route::tcp)),
                         name_of);
}

namespace {

/// Runs `body` as each rank on a thread of its own and returns the errors by rank, empty where there was none.
std::vector<std::string> errors_of(int num_ranks, const std::function<void(int rank)>& body) {
  std::vector<std::string> errors(static_cast<std::size_t>(num_ranks));
  {
    std::vector<std::jthread> threads;
    for (int rank = 0; rank < num_ranks; ++rank) {
      threads.emplace_back([&, rank] {
        try {
          body(rank);
        } catch (const std::exception& error) {
          errors[static_cast<std::size_t>(rank)] = error.what();
        }
      });
    }
  }
  return errors;
}

int free_port() {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  socklen_t size = sizeof address;
  ::bind(fd, reinterpret_cast<const sockaddr*>(&address), size);
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  ::close(fd);
  return ntohs(address.sin_port);
}

ConnectOptions options_with(StorePtr store, std::chrono::milliseconds timeout = 60s) {
  ConnectOptions options;
  options.timeout = timeout;
  options.store = std::move(store);
  return options;
}

/// Where the ranks of a default communicator without a run id meet in `store`.
StorePtr meeting_place(const StorePtr& store) {
  return c10::make_intrusive<c10d::PrefixStore>("dualpipe//dualpipe/0", store);
}

std::string announcement(int version, int size) {
  return nlohmann::json({{"version", version}, {"size", size}, {"host", "elsewhere"}, {"token", std::string(32, '0')}})
      .dump();
}

TEST(Sockets, AWorldOfOneNeedsNoStore) {
  const Ptr comm = connect_sockets(World());
  EXPECT_EQ(comm->size(), 1);
  comm->barrier().wait();
  const auto tensor = torch::ones({3});
  EXPECT_TRUE(torch::equal(comm->all_reduce({tensor}).take().at(0), torch::ones({3})));
}

TEST(Sockets, RefuseAWorldWithoutAMeetingPlace) {
  try {
    connect_sockets(world_of(0, 2));
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("MASTER_PORT"), HasSubstr("dualpipe-run or torchrun")));
  }
  EXPECT_THROW(connect_sockets(world_of(2, 2)), InvalidArgument);
  ConnectOptions impatient;
  impatient.timeout = 0ms;
  EXPECT_THROW(connect_sockets(World(), impatient), InvalidArgument);
}

TEST(Sockets, MeetAtAPort) {
  const int port = free_port();
  const auto errors = errors_of(3, [&](int rank) {
    World world = world_of(rank, 3);
    world.master_port = port;
    if (rank == 0) std::this_thread::sleep_for(100ms);  // the others come before there is a server
    ConnectOptions options;
    options.timeout = 60s;
    const Ptr comm = connect_sockets(world, options);
    const auto sum = comm->all_reduce({torch::full({2}, rank + 1.0)}).take();
    if (!torch::equal(sum.at(0), torch::full({2}, 6.0))) throw Error("wrong sum");
  });
  EXPECT_THAT(errors, ::testing::Each(""));
}

TEST(Sockets, NameThoseWhoDoNotCome) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  const auto errors = errors_of(4, [&](int rank) {
    if (rank == 1 || rank == 2) return;
    connect_sockets(world_of(rank, 4), options_with(store, 300ms));
  });
  for (const int rank : {0, 3})
    EXPECT_THAT(errors[static_cast<std::size_t>(rank)],
                AllOf(HasSubstr("no sign of rank 1, 2 within 300 ms"), HasSubstr("WORLD_SIZE")));
}

TEST(Sockets, SayWhenNobodyServesThePort) {
  World world = world_of(1, 2);
  world.master_port = free_port();
  ConnectOptions options;
  options.timeout = 200ms;
  try {
    connect_sockets(world, options);
    FAIL();
  } catch (const CommError& error) {
    EXPECT_EQ(error.origin_rank(), 0);
    EXPECT_THAT(error.what(), AllOf(HasSubstr(std::to_string(world.master_port)), HasSubstr("MASTER_PORT")));
  }
}

TEST(Sockets, NameARankThatComesButDoesNotConnect) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  meeting_place(store)->set("announcement/1", announcement(static_cast<int>(detail::wire::protocol_version), 2));
  const auto errors = errors_of(1, [&](int) { connect_sockets(world_of(0, 2), options_with(store, 300ms)); });
  EXPECT_THAT(errors[0], HasSubstr("rank 1 has started but does not connect"));
}

TEST(Sockets, SayWhereARankCannotBeReached) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  const int closed = free_port();
  meeting_place(store)->set("announcement/0", announcement(static_cast<int>(detail::wire::protocol_version), 2));
  meeting_place(store)->set("tcp/0", nlohmann::json({{"port", closed}, {"addresses", {"127.0.0.1"}}}).dump());
  const auto errors = errors_of(2, [&](int rank) {
    if (rank == 1) connect_sockets(world_of(1, 2), options_with(store, 300ms));
  });
  EXPECT_THAT(errors[1], AllOf(HasSubstr(detail::str("rank 0 has started but cannot be reached at 127.0.0.1:", closed,
                                                     " (Connection refused)")),
                               HasSubstr("firewall")));
}

TEST(Sockets, TellWhatTheyWaitForLongBeforeTheyGiveUp) {
  struct Recorder : c10::WarningHandler {
    std::vector<std::string> texts;
    void process(const c10::Warning& warning) override { texts.push_back(warning.msg()); }
  } recorder;
  const c10::WarningUtils::WarningHandlerGuard guard(&recorder);
  World world = world_of(1, 3);
  world.master_port = free_port();
  ConnectOptions options;
  options.timeout = 400ms;
  EXPECT_THROW(connect_sockets(world, options), CommError);
  options.store = c10::make_intrusive<c10d::HashStore>();
  EXPECT_THROW(connect_sockets(world, options), CommError);
  EXPECT_THAT(recorder.texts,
              ::testing::ElementsAre(
                  ::testing::StartsWith(detail::str("rank 1 waits for rank 0 to serve the store at 127.0.0.1:",
                                                    world.master_port, " (Connection refused), and gives up in")),
                  ::testing::StartsWith("rank 1 waits for rank 0, 2 to start (communicator 'dualpipe', epoch 0)")));
}

TEST(Sockets, AnnounceLoopbackAddressesLast) {
  World world;
  world.master_port = 1;
  for (const std::string master : {"127.0.0.1", "127.0.1.1"}) {
    world.master_address = master;  // as a host's own name often is on this host
    const std::vector<std::string> addresses = detail::own_addresses(world);
    EXPECT_THAT(addresses, ::testing::Contains(::testing::StartsWith("127.")));
    EXPECT_TRUE(std::is_partitioned(addresses.begin(), addresses.end(), [](const std::string& address) {
      return !address.starts_with("127.");
    })) << ::testing::PrintToString(addresses);
  }
}

TEST(Sockets, RefuseRanksOfAnotherKind) {
  const auto error_with = [](const std::string& other) {
    const StorePtr store = c10::make_intrusive<c10d::HashStore>();
    meeting_place(store)->set("announcement/1", other);
    return errors_of(1, [&](int) { connect_sockets(world_of(0, 2), options_with(store)); })[0];
  };
  EXPECT_THAT(error_with(announcement(static_cast<int>(detail::wire::protocol_version), 3)),
              HasSubstr("rank 1 has WORLD_SIZE 3, this rank 2"));
  EXPECT_THAT(error_with(announcement(99, 2)),
              HasSubstr(detail::str("rank 1 has protocol version 99, this rank ", detail::wire::protocol_version)));
}

TEST(Sockets, NameARankWhoseAnnouncementIsMalformed) {
  const nlohmann::json good = nlohmann::json::parse(announcement(static_cast<int>(detail::wire::protocol_version), 2));
  const auto with = [&](const char* key, const nlohmann::json& value) {
    nlohmann::json changed = good;
    changed[key] = value;
    return changed.dump();
  };
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("[]"), std::string("{\"version\": true}"), with("version", "two"),
        with("host", nullptr), with("token", "short"), with("token", std::string(33, '0')),
        with("unix", std::string(200, 'x'))}) {
    const StorePtr store = c10::make_intrusive<c10d::HashStore>();
    meeting_place(store)->set("announcement/1", text);
    try {
      connect_sockets(world_of(0, 2), options_with(store));
      ADD_FAILURE() << text;
    } catch (const CommError& error) {
      EXPECT_EQ(error.origin_rank(), 1);
      EXPECT_THAT(error.what(), HasSubstr("rank 0: rank 1 has published something malformed")) << text;
    }
  }
  for (const std::string text : {"7", "{\"port\": 0, \"addresses\": []}", "{\"port\": 70000, \"addresses\": []}",
                                 "{\"port\": 1}", "{\"port\": 1, \"addresses\": [\"nowhere\"]}"}) {
    const StorePtr store = c10::make_intrusive<c10d::HashStore>();
    meeting_place(store)->set("announcement/0", good.dump());
    meeting_place(store)->set("tcp/0", text);
    try {
      connect_sockets(world_of(1, 2), options_with(store));
      ADD_FAILURE() << text;
    } catch (const CommError& error) {
      EXPECT_THAT(error.what(), HasSubstr("rank 1: rank 0 has published something malformed")) << text;
    }
  }
}

TEST(Sockets, SayThatThereAreNoMoreDescriptors) {
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const int first_free = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  ::close(first_free);
  std::vector<std::string> texts;
  // More of the connecting succeeds from one try to the next.
  for (int more = 0; more < 8; ++more) {
    const StorePtr store = c10::make_intrusive<c10d::HashStore>();
    meeting_place(store)->set("announcement/0", announcement(static_cast<int>(detail::wire::protocol_version), 2));
    meeting_place(store)->set("tcp/0", nlohmann::json({{"port", 1}, {"addresses", {"127.0.0.1"}}}).dump());
    rlimit limit = before;
    limit.rlim_cur = static_cast<rlim_t>(first_free + more);
    ::setrlimit(RLIMIT_NOFILE, &limit);
    try {
      connect_sockets(world_of(1, 2), options_with(store, 100ms));
      texts.emplace_back("connected");
    } catch (const CommError& error) {
      texts.emplace_back(error.what());
    } catch (const std::exception& error) {
      texts.emplace_back(detail::str("not a CommError: ", error.what()));
    }
    ::setrlimit(RLIMIT_NOFILE, &before);
  }
  EXPECT_THAT(texts, ::testing::Each(::testing::StartsWith("rank 1: ")));
  EXPECT_THAT(texts.front(), HasSubstr("Too many open files"));
}

TEST(Sockets, SayThatNoThreadCanStartAndLeaveSignalsAsTheyWere) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  pthread_attr_t before, huge;
  ASSERT_EQ(::pthread_getattr_default_np(&before), 0);
  ASSERT_EQ(::pthread_getattr_default_np(&huge), 0);
  ASSERT_EQ(::pthread_attr_setstacksize(&huge, std::size_t{1} << 47), 0);  // more than there are addresses
  std::latch started(2), ended(2);
  std::atomic<int> changed_masks{0};
  const auto errors = errors_of(2, [&](int rank) {
    started.arrive_and_wait();
    if (rank == 0) ::pthread_setattr_default_np(&huge);
    sigset_t mask_before, mask_after;
    ::pthread_sigmask(SIG_SETMASK, nullptr, &mask_before);
    std::string problem;
    try {
      const Ptr comm = connect_sockets(world_of(rank, 2), options_with(store));
      comm->barrier().wait();
    } catch (const CommError& error) {
      problem = error.what();
    }
    ::pthread_sigmask(SIG_SETMASK, nullptr, &mask_after);
    for (int signal = 1; signal < 32; ++signal)
      if (sigismember(&mask_before, signal) != sigismember(&mask_after, signal)) ++changed_masks;
    ended.arrive_and_wait();
    if (rank == 0) ::pthread_setattr_default_np(&before);
    throw Error(problem);
  });
  EXPECT_THAT(errors, ::testing::Each(HasSubstr("cannot start the I/O thread: ")));
  EXPECT_EQ(changed_masks, 0);
  EXPECT_THAT(errors_of(2,
                        [&](int rank) {
                          ConnectOptions next = options_with(store);
                          next.epoch = 1;
                          connect_sockets(world_of(rank, 2), next)->barrier().wait();
                        }),
              ::testing::Each(""));
}

TEST(Sockets, DropStrangersUnharmed) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  const StorePtr place = meeting_place(store);
  place->set("announcement/1", announcement(static_cast<int>(detail::wire::protocol_version),
                                            2));  // so that rank 0 waits for a rank of another host
  std::vector<int> strangers;
  const auto errors = errors_of(2, [&](int rank) {
    if (rank == 1) {
      while (!place->check({"tcp/0"})) std::this_thread::sleep_for(1ms);
      const int port = nlohmann::json::parse(place->get_to_str("tcp/0")).at("port");
      for (const std::string& greeting :
           {std::string(), std::string("GET / HTTP/1.1\r\n\r\n"), std::string(1 << 16, 'x')}) {
        const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
        sockaddr_in address{};
        address.sin_family = AF_INET;
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        address.sin_port = htons(static_cast<std::uint16_t>(port));
        if (::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) throw Error("no listener");
        ::send(fd, greeting.data(), greeting.size(), MSG_NOSIGNAL);
        strangers.push_back(fd);
      }
    }
    const Ptr comm =
        detail::connect_sockets(world_of(rank, 2), options_with(store), rank == 0 ? Route::best : Route::tcp);
    comm->barrier().wait();
  });
  EXPECT_THAT(errors, ::testing::Each(""));
  for (const int fd : strangers) ::close(fd);
}

TEST(Sockets, MayBeConnectedAgainUnderTheSameName) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  const auto errors = errors_of(3, [&](int rank) {
    for (int round = 0; round < 5; ++round) {
      const Ptr comm = connect_sockets(world_of(rank, 3), options_with(store));
      comm->barrier().wait();
    }
  });
  EXPECT_THAT(errors, ::testing::Each(""));
}

TEST(Sockets, HoldBackAFloodButNotWhatIsWaitedFor) {
  constexpr int num_messages = 6;
  constexpr std::int64_t num_bytes = 32 << 20;
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  std::atomic<bool> looked{false};
  const auto errors = errors_of(2, [&](int rank) {
    const Ptr comm = connect_sockets(world_of(rank, 2), options_with(store));
    if (rank == 0) {
      const auto flood = torch::full({num_bytes}, 7, torch::kByte);
      std::vector<Pending> sends;
      for (int i = 0; i < num_messages; ++i) sends.push_back(comm->send(1, {flood}));
      sends.front().wait();
      std::this_thread::sleep_for(300ms);
      const bool held_back = !sends.back().done();
      looked = true;
      comm->barrier().wait();  // travels behind the flood
      for (Pending& send : sends) send.wait();
      if (!held_back) throw Error("nothing was held back");
      return;
    }
    while (!looked) std::this_thread::sleep_for(1ms);
    comm->barrier().wait();
    for (int i = 0; i < num_messages; ++i) {
      if (!comm->receive(0).take().at(0).eq(7).all().item<bool>()) throw Error("wrong bytes");
    }
  });
  EXPECT_THAT(errors, ::testing::Each(""));
}

TEST(Sockets, AFloodPassesWhenItIsTaken) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  const auto errors = errors_of(2, [&](int rank) {
    const Ptr comm = connect_sockets(world_of(rank, 2), options_with(store));
    std::vector<Pending> sends;
    for (int i = 0; rank == 0 && i < 8; ++i) sends.push_back(comm->send(1, {torch::full({24 << 20}, i, torch::kByte)}));
    if (rank == 1) std::this_thread::sleep_for(200ms);
    for (int i = 0; rank == 1 && i < 8; ++i) {
      Pending received = comm->receive(0);
      while (!received.done()) std::this_thread::yield();  // polling alone must get it
      if (!received.take().at(0).eq(i).all().item<bool>()) throw Error("wrong bytes");
    }
    for (Pending& send : sends) send.wait();
  });
  EXPECT_THAT(errors, ::testing::Each(""));
}

TEST(Sockets, ManyTensorsTravelInOneMessage) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  const auto errors = errors_of(2, [&](int rank) {
    const Ptr comm = connect_sockets(world_of(rank, 2), options_with(store));
    Tensors tensors;
    for (int i = 0; i < 3000; ++i)
      tensors.push_back(torch::full({i % 50}, i, torch::kInt));  // more than fit one system call
    Pending sent = comm->send(1 - rank, tensors);
    const Tensors got = comm->receive(1 - rank).take();
    sent.wait();
    for (std::size_t i = 0; i < tensors.size(); ++i)
      if (!torch::equal(got.at(i), tensors[i])) throw Error(detail::str("tensor ", i));
  });
  EXPECT_THAT(errors, ::testing::Each(""));
}

TEST(Sockets, LeavingDoesNotWaitForAPeerThatTakesNothing) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  std::atomic<bool> left{false};  // never, if leaving waited for the peer
  const auto errors = errors_of(2, [&](int rank) {
    Ptr comm = connect_sockets(world_of(rank, 2), options_with(store));
    if (rank == 1) {
      while (!left) std::this_thread::sleep_for(5ms);
      return;
    }
    for (int i = 0; i < 5; ++i) comm->send(1, {torch::zeros({32 << 20}, torch::kByte)});
    comm.reset();
    left = true;
  });
  EXPECT_THAT(errors, ::testing::Each(""));
}

// ---- ranks that are processes

std::vector<std::string> run(int ranks, const std::string& mode, const std::vector<std::string>& flags = {}) {
  std::vector<std::string> command = {DUALPIPE_RUN, "-q", "-n", std::to_string(ranks)};
  command.insert(command.end(), flags.begin(), flags.end());
  command.insert(command.end(), {"--", SOCKET_RANK, mode});
  return command;
}

std::size_t count(const std::string& text, const std::string& what) {
  std::size_t found = 0;
  for (std::size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++found;
  return found;
}

class SocketProcesses : public ::testing::TestWithParam<int> {
 protected:
  void expect_fine(const std::string& mode) {
    Process ranks(run(GetParam(), mode));
    EXPECT_EQ(ranks.wait(), 0) << ranks.err();
    EXPECT_EQ(count(ranks.out(), "fine"), static_cast<std::size_t>(GetParam())) << ranks.out();
    EXPECT_EQ(ranks.err(), "");
  }
  /// All but rank 1 blame rank 1.
  void expect_blame(const Process& ranks) {
    EXPECT_EQ(count(ranks.out(), "origin 1 "), static_cast<std::size_t>(GetParam() - 1)) << ranks.out() << ranks.err();
    EXPECT_EQ(count(ranks.out(), "origin "), static_cast<std::size_t>(GetParam() - 1)) << ranks.out() << ranks.err();
  }
};

TEST_P(SocketProcesses, Transfer) { expect_fine("transfers"); }
TEST_P(SocketProcesses, TwoCommunicatorsDoNotSeeEachOther) { expect_fine("two_names"); }
TEST_P(SocketProcesses, ConnectAgainAfterAFailure) { expect_fine("reconnect"); }

TEST_P(SocketProcesses, AKilledPeerIsNamedAtOnce) {
  Process ranks(run(GetParam(), "killed"));
  EXPECT_EQ(ranks.wait(), 128 + SIGKILL) << ranks.err();
  expect_blame(ranks);
  EXPECT_THAT(ranks.out(), HasSubstr("rank 1 closed its connection without saying goodbye (killed?)"));
}

TEST_P(SocketProcesses, AStoppedPeerIsNamedByTheDeadline) {
  Process ranks(run(GetParam(), "stopped", {"--grace", "0.1"}));
  EXPECT_EQ(ranks.wait(), 1) << ranks.err();
  expect_blame(ranks);
  EXPECT_THAT(ranks.out(), HasSubstr("waited for rank 1 longer than the timeout of 1000 ms"));
}

/// Rank 0, which serves the store, gives up first: its end must not overtake the reason.
TEST_P(SocketProcesses, MissingRanksAreNamedByAllThatCame) {
  Process ranks(run(GetParam(), "missing"));
  EXPECT_EQ(ranks.wait(), 0) << ranks.err();
  const auto here = static_cast<std::size_t>(GetParam() / 2);
  EXPECT_EQ(count(ranks.out(), "origin 1 "), here) << ranks.out();
  EXPECT_EQ(count(ranks.out(), here == 1 ? "no sign of rank 1 within" : "no sign of rank 1, 3 within"), here)
      << ranks.out();
}

TEST_P(SocketProcesses, TheOneThatFailedIsBlamedNotThoseWhoReacted) {
  Process ranks(run(GetParam(), "throws"));
  EXPECT_EQ(ranks.wait(), 1) << ranks.err();
  expect_blame(ranks);
  EXPECT_EQ(count(ranks.out(), "failed because of rank 1: the loss is not a number"),
            static_cast<std::size_t>(GetParam() - 1));
}

TEST_P(SocketProcesses, AChildProcessDoesNotHideADeath) {
  Process ranks(run(GetParam(), "child"));
  EXPECT_EQ(ranks.wait(), 128 + SIGKILL) << ranks.err();
  expect_blame(ranks);
  EXPECT_THAT(ranks.out(), HasSubstr("rank 1 closed its connection without saying goodbye (killed?)"));
}

/// What follows "over " in the output: how many steps are over for each survivor.
std::vector<int> steps_over(const std::string& output) {
  std::vector<int> steps;
  for (auto at = output.find("] over "); at != std::string::npos; at = output.find("] over ", at + 1))
    steps.push_back(std::stoi(output.substr(at + 7)));
  return steps;
}

TEST_P(SocketProcesses, AKilledRankLeavesTheOthersAtOneStep) {
  constexpr unsigned seed = 20;
  std::mt19937 random(seed);
  for (int round = 0; round < 4; ++round) {
    auto command = run(GetParam(), "steps-killed");
    command.push_back(std::to_string(random() % 20'000));
    Process ranks(command);
    EXPECT_EQ(ranks.wait(), 128 + SIGKILL) << ranks.err();
    const std::vector<int> over = steps_over(ranks.out());
    EXPECT_EQ(over.size(), static_cast<std::size_t>(GetParam() - 1)) << ranks.out();
    EXPECT_EQ(std::set<int>(over.begin(), over.end()).size(), 1u) << ranks.out();
    EXPECT_EQ(count(ranks.out(), "origin 1 "), over.size()) << ranks.out();
  }
}

TEST_P(SocketProcesses, AStoppedRankIsFoundByItsSilenceNotByTheDeadline) {
  Process ranks(run(GetParam(), "steps-stopped", {"--grace", "0.1"}));
  EXPECT_EQ(ranks.wait(), 1) << ranks.err();
  const std::vector<int> over = steps_over(ranks.out());
  EXPECT_EQ(over.size(), static_cast<std::size_t>(GetParam() - 1)) << ranks.out();
  EXPECT_EQ(std::set<int>(over.begin(), over.end()).size(), 1u) << ranks.out();
  EXPECT_EQ(count(ranks.out(), "rank 1 has given no sign of life for 1000 ms"), over.size()) << ranks.out();
}

INSTANTIATE_TEST_SUITE_P(Ranks, SocketProcesses, ::testing::Values(2, 4), ::testing::PrintToStringParamName());

class SocketsUnderTorchrun : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(TORCHRUN)) GTEST_SKIP() << "there is no " << TORCHRUN;
  }
  static std::vector<std::string> torchrun(const std::string& mode) {
    return {TORCHRUN, "--standalone", "--nproc-per-node", "2", "--no-python", SOCKET_RANK, mode};
  }
};

TEST_F(SocketsUnderTorchrun, Transfer) {
  Process ranks(torchrun("transfers"));
  EXPECT_EQ(ranks.wait(100s), 0) << ranks.err();
  EXPECT_EQ(count(ranks.out(), "fine"), 2u) << ranks.out();
}

TEST_F(SocketsUnderTorchrun, TheErrorIsInTorchrunsReport) {
  Process ranks(torchrun("throws"));
  EXPECT_EQ(ranks.wait(100s), 1) << ranks.err();
  const std::string report = ranks.err().substr(std::min(ranks.err().find("Root Cause"), ranks.err().size()));
  EXPECT_THAT(report, HasSubstr("the loss is not a number")) << ranks.err();
}

}  // namespace
}  // namespace dualpipe
