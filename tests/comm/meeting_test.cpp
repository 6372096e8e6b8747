// How ranks find each other and come to their connections: who is let in, who is named, and until when one waits.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <sys/resource.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <algorithm>
#include <asio/local/connect_pair.hpp>
#include <asio/local/stream_protocol.hpp>
#include <atomic>
#include <csignal>
#include <cstddef>
#include <latch>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <regex>
#include <set>

#include "comm/socket_tests.hpp"
#include "contact/contact.hpp"
#include "contact/host.hpp"
#include "contact/stand_in.hpp"
#include "dualpipe/detail/files.hpp"
#include "launch/failed_file.hpp"
#include "launch/met_file.hpp"
#include "socket/connect.hpp"
#include "socket/meeting.hpp"
#include "temporary_folder.hpp"

namespace dualpipe {
namespace {

using namespace std::chrono_literals;
using namespace dualpipe::testing;
using detail::Meeting;
using detail::Route;
using detail::str;
using ::testing::AllOf;
using ::testing::Each;
using ::testing::HasSubstr;
using ::testing::StartsWith;

/// A rank of `world` as far as the meeting goes, with the parts of connecting in a test's hands.
void meet(const World& world, const ConnectOptions& options, const std::function<void(Meeting&)>& body) {
  asio::io_context io;
  const auto meeting = detail::meet(io, world, options, Route::best, nullptr);
  try {
    meeting->join();
    body(*meeting);
    meeting->leave();
  } catch (const CommError& error) {
    meeting->give_up(error);
    throw;
  }
}

std::string host_text(const std::string& host) {
  return nlohmann::json({{"host", host}, {"unix", "dualpipe.nowhere"}, {"rank 0", "127.0.0.1"}}).dump();
}

/// A communicator that proves that it works.
void connect_and_sum(const World& world, const ConnectOptions& options, Route route = Route::best) {
  const auto comm = detail::connect_sockets(world, options, route);
  const auto sum = comm->all_reduce({at::full({2}, world.rank + 1.0)}).take();
  if (!at::all(sum.at(0) == world.size * (world.size + 1) / 2.0).item<bool>()) throw Error("wrong sum");
  comm->barrier().wait();
}

// ---- those who do not come

TEST(Meeting, WhatAllSayComesToAll) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  const auto errors = errors_of(4, [&](int rank) {
    meet(world_of(rank, 4), options_with(store), [&](Meeting& meeting) {
      for (int round = 0; round < 5; ++round) {
        const auto all = meeting.all_gather(str(rank, " in ", round), "");
        for (int other = 0; other < 4; ++other)
          if (all.at(other) != str(other, " in ", round)) throw Error("got " + all.at(other));
      }
    });
  });
  EXPECT_THAT(errors, Each(""));
}

TEST(Meeting, NamesThoseWhoDoNotCome) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  const auto errors = errors_of(4, [&](int rank) {
    if (rank == 0 || rank == 3) connect_sockets(world_of(rank, 4), options_with(store, 2s));
  });
  for (const int rank : {0, 3})
    EXPECT_THAT(errors[rank], AllOf(HasSubstr("no sign of rank 1, 2 within 2000 ms"), HasSubstr("WORLD_SIZE")));
}

TEST(Meeting, SaysWhereRankZeroWasLookedFor) {
  const World world = world_at(free_port(), 1, 2);
  try {
    connect_sockets(world, {.timeout = 1s});
    FAIL();
  } catch (const CommError& error) {
    EXPECT_EQ(error.origin_rank(), 0);
    EXPECT_THAT(error.what(), AllOf(HasSubstr(str("127.0.0.1:", world.master_port)), HasSubstr("Connection refused"),
                                    HasSubstr("MASTER_PORT")));
  }
}

TEST(Meeting, TellsWhatItWaitsForLongBeforeItGivesUp) {
  struct Texts : c10::WarningHandler {
    std::vector<std::string> texts;
    void process(const c10::Warning& warning) override { texts.push_back(warning.msg()); }
  } warnings;
  const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
  const int port = free_port();
  EXPECT_THROW(connect_sockets(world_at(port, 1, 3), {.timeout = 2s}), CommError);
  EXPECT_THROW(connect_sockets(world_at(port, 0, 3), {.timeout = 2s}), CommError);
  EXPECT_THAT(warnings.texts,
              ::testing::ElementsAre(
                  StartsWith(str("rank 1 waits for rank 0 at the Unix domain socket for 127.0.0.1:", port,
                                 " (Connection refused), and gives up in")),
                  StartsWith("rank 0 waits for rank 1, 2 to start (communicator 'dualpipe', epoch 0), and gives up")));
}

TEST(Meeting, NamesARankThatComesButDoesNotConnect) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  for (const std::string& host : {detail::host_identity(), std::string("elsewhere")}) {
    const auto errors = errors_of(2, [&](int rank) {
      if (rank == 0) connect_sockets(world_of(0, 2), options_with(store, 1500ms));
      meet(world_of(1, 2), options_with(store), [&](Meeting& meeting) {
        meeting.all_gather(host_text(host), "");
        meeting.all_gather(R"({"address": "", "port": 0})", "");
        meeting.all_gather("", "");
      });
    });
    EXPECT_EQ(errors[0], errors[1]);
    EXPECT_THAT(errors[0], HasSubstr("rank 0: rank 1 has started but does not connect"));
    EXPECT_EQ(count(errors[0], "firewall"), host == "elsewhere" ? 1u : 0u) << errors[0];
  }
}

TEST(Meeting, SaysWhereARankCannotBeReached) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  const int closed = free_port();
  const auto errors = errors_of(2, [&](int rank) {
    if (rank == 1) connect_sockets(world_of(1, 2), options_with(store, 1500ms));
    meet(world_of(0, 2), options_with(store), [&](Meeting& meeting) {
      meeting.all_gather(host_text("elsewhere"), "");
      meeting.all_gather(nlohmann::json({{"address", "127.0.0.1"}, {"port", closed}}).dump(), "");
      meeting.all_gather("", "");
    });
  });
  EXPECT_EQ(errors[0], errors[1]);
  EXPECT_THAT(
      errors[1],
      AllOf(HasSubstr(str("rank 0 has started but cannot be reached at 127.0.0.1:", closed, " (Connection refused)")),
            HasSubstr("firewall")));
}

TEST(Meeting, NamesARankThatSaysSomethingMalformed) {
  const std::string good = host_text("elsewhere");
  for (const std::vector<std::string>& said : std::vector<std::vector<std::string>>{
           {""},
           {"{"},
           {"[]"},
           {R"({"host": 7})"},
           {R"({"host": "a", "unix": "b", "rank 0": "nowhere"})"},
           {nlohmann::json({{"host", "a"}, {"unix", std::string(200, 'b')}, {"rank 0", ""}}).dump()},
           {good, "7"},
           {good, R"({"address": "nowhere", "port": 1})"},
           {good, R"({"address": "127.0.0.1"})"},
           {good, R"({"address": "127.0.0.1", "port": -1})"},
           {good, R"({"address": "127.0.0.1", "port": 65536})"},
           {good, R"({"address": "127.0.0.1", "port": 0.5})"}}) {
    const StorePtr store = c10::make_intrusive<c10d::HashStore>();
    const auto errors = errors_of(2, [&](int rank) {
      if (rank == 1) connect_sockets(world_of(1, 2), options_with(store));
      meet(world_of(0, 2), options_with(store), [&](Meeting& meeting) {
        for (const std::string& text : said) meeting.all_gather(text, "");
        meeting.all_gather("", "");
      });
    });
    EXPECT_EQ(errors[0], errors[1]);
    EXPECT_THAT(errors[1], HasSubstr("rank 1: rank 0 has said something malformed")) << ::testing::PrintToString(said);
  }
}

/// As the launcher of the node of ranks 2 and 3 tells it.
TEST(Meeting, ARankThatEndsBeforeItComesIsNamedOnAll) {
  const test::TemporaryFolder folder;
  const std::string file = folder.path() / "failed";
  const auto report = [](int rank) {
    return detail::to_json({.message = str("rank ", rank, ": killed by SIGKILL (signal 9)"),
                            .rank = rank,
                            .origin = rank,
                            .operation = {},
                            .time_ns = 0});
  };
  ::setenv("DUALPIPE_FAILED_FILE", file.c_str(), 1);
  // These say nothing about this world.
  for (const std::string& text : {std::string("{"), report(4), report(-1)}) {
    detail::write_file(file, text);
    const StorePtr store = c10::make_intrusive<c10d::HashStore>();
    EXPECT_THAT(errors_of(2, [&](int rank) { connect_and_sum(world_of(rank, 2), options_with(store)); }), Each(""))
        << text;
  }
  // Nor does this: the launcher has started eight ranks, of which the program connects two.
  detail::write_file(file, report(1));
  ::setenv("WORLD_SIZE", "8", 1);
  const StorePtr part = c10::make_intrusive<c10d::HashStore>();
  EXPECT_THAT(errors_of(2, [&](int rank) { connect_and_sum(world_of(rank, 2), options_with(part)); }), Each(""));
  ::unsetenv("WORLD_SIZE");
  std::filesystem::remove(file);
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  std::vector<int> origins(4, -1);
  const auto errors = errors_of(4, [&](int rank) {
    if (rank == 3) {
      std::this_thread::sleep_for(200ms);  // the others have met by then
      return detail::write_file(file, report(3));
    }
    try {
      connect_sockets(world_of(rank, 4), options_with(store));
    } catch (const CommError& error) {
      origins[rank] = error.origin_rank();
      throw;
    }
  });
  ::unsetenv("DUALPIPE_FAILED_FILE");
  for (const int rank : {0, 1, 2}) {
    EXPECT_EQ(errors[rank], "rank 3 ended before it met the others: killed by SIGKILL (signal 9)");
    EXPECT_EQ(origins[rank], 3);
  }
}

TEST(Meeting, WhoEndsBecauseItWasToldPassesOnWhatItWasTold) {
  const std::string text = "rank 2 ended before it met the others: exit code 3";
  EXPECT_EQ(detail::absence_of({.message = text, .rank = 1, .origin = 2, .operation = "rendezvous", .time_ns = 0}),
            text);
}

TEST(Meeting, TheLauncherReadsWhomARankHasMetInItsLastMeeting) {
  const test::TemporaryFolder folder;
  const std::string file = folder.path() / "met";
  const auto expect = [&](const std::set<int>& ranks, bool before) {
    const detail::Met met = detail::read_met(file);
    EXPECT_EQ(met.ranks, ranks);
    EXPECT_EQ(met.before, before);
  };
  expect({}, false);
  detail::note_meeting(file);
  expect({}, false);
  detail::note_met(file, 2);
  detail::note_met(file, 1);
  expect({1, 2}, false);
  detail::note_meeting(file);
  expect({}, true);
  detail::note_met(file, 3);
  expect({3}, true);
  detail::note_met("", 3);  // no launcher
}

/// For a rank that is alone on its node.
World alone_on_its_node(int port, int rank, int size) {
  World world = world_at(port, rank, size);
  world.local_rank = 0;
  world.local_size = 1;
  return world;
}

detail::FailureReport exit_of(int rank) {
  return {.message = str("rank ", rank, ": exit code 3"), .rank = rank, .origin = rank, .operation = {}, .time_ns = 0};
}

TEST(Meeting, ALauncherStandsInForARankThatHasMetNobody) {
  for (const bool secret : {false, true}) {
    for (const int absent : {0, 2}) {
      const int port = free_port();
      const auto world = [&](int rank) {
        World own = alone_on_its_node(port, rank, 4);
        if (secret) own.secret = "a secret of all these ranks";
        return own;
      };
      std::vector<int> origins(4, -1);
      const auto errors = errors_of(4, [&](int rank) {
        if (rank == absent) {
          detail::StandIn stand_in(world(rank), {}, exit_of(rank), 30s);
          while (!stand_in.is_over()) std::this_thread::sleep_for(1ms);
          if (!stand_in.all_know()) throw Error("not all know");
          return;
        }
        if (rank == 3) std::this_thread::sleep_for(200ms);  // the others have called by then
        try {
          connect_sockets(world(rank), {.timeout = 60s});
        } catch (const CommError& error) {
          origins[rank] = error.origin_rank();
          throw;
        }
      });
      for (int rank = 0; rank < 4; ++rank) {
        EXPECT_EQ(errors[rank],
                  rank == absent ? "" : str("rank ", absent, " ended before it met the others: exit code 3"));
        EXPECT_EQ(origins[rank], rank == absent ? -1 : absent);
      }
    }
  }
}

TEST(Meeting, ALauncherDoesNotSpeakForARankThatHasCome) {
  const int port = free_port();
  std::latch told(1);
  const auto errors = errors_of(3, [&](int rank) {
    if (rank == 2) told.wait();
    meet(world_at(port, rank, 3), {.timeout = 60s}, [&](Meeting& meeting) {
      if (rank == 1) {
        const detail::StandIn launcher(alone_on_its_node(port, 1, 3), {}, exit_of(1), 30s);
        while (!launcher.is_over()) std::this_thread::sleep_for(1ms);
        told.count_down();
        if (!launcher.all_know()) throw Error("rank 0 has not answered");
      }
      meeting.all_gather("", "");
    });
  });
  EXPECT_THAT(errors, Each(""));
}

TEST(Meeting, ALauncherLooksForNobodyWhoHasMetItsRank) {
  const int port = free_port();
  for (const int absent : {0, 2}) {
    const auto begin = std::chrono::steady_clock::now();
    detail::StandIn over(alone_on_its_node(port, absent, 3), absent == 0 ? std::set<int>{1, 2} : std::set<int>{0},
                         exit_of(absent), 1h);
    while (!over.is_over()) std::this_thread::sleep_for(1ms);
    EXPECT_TRUE(over.all_know());
    detail::StandIn late(alone_on_its_node(port, absent, 3), absent == 0 ? std::set<int>{1} : std::set<int>{},
                         exit_of(absent), 100ms);
    while (!late.is_over()) std::this_thread::sleep_for(1ms);
    EXPECT_FALSE(late.all_know());
    EXPECT_GE(std::chrono::steady_clock::now() - begin, 100ms);
  }
  detail::StandIn(alone_on_its_node(port, 0, 3), {}, exit_of(0), 1h);  // is given up at once
}

TEST(Meeting, ALauncherOfAnotherRunIsNotHeard) {
  const int port = free_port();
  World other = world_at(port, 1, 2);
  other.run_id += " another";
  const std::string place = detail::meeting_name(world_at(port, 0, 2), "dualpipe", 0);
  const auto errors = errors_of(2, [&](int rank) {
    if (rank == 0) return connect_and_sum(world_at(port, 0, 2), {.timeout = 60s});
    asio::io_context io;
    detail::Introduction introduction{
        .own = {}, .key = "", .check = [](const auto&, const auto&) { return std::string(); }};
    introduction.own.rank = 1;
    introduction.own.size = 2;
    introduction.own.meeting = detail::meeting_of_launchers(other);
    const auto caller = std::make_shared<detail::Caller>(
        io, introduction, [&] { return std::vector<detail::Place>{{"here", detail::unix_endpoint(place), ""}}; },
        [](detail::Contact) { throw Error("heard"); });
    caller->start();
    while (caller->outcomes() != "here (it closes the connection)" && io.run_one_for(10s) > 0) {
    }
    const std::string outcome = caller->outcomes();
    caller->close();
    connect_and_sum(world_at(port, 1, 2), {.timeout = 60s});
    if (outcome != "here (it closes the connection)") throw Error(outcome);
  });
  EXPECT_THAT(errors, Each(""));
}

TEST(Meeting, WorldsOfDifferentSizesAreOneErrorEverywhere) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  const auto errors = errors_of(3, [&](int rank) {
    if (rank == 2) std::this_thread::sleep_for(300ms);  // the others should have come by then
    connect_sockets(world_of(rank, rank == 2 ? 8 : 3), options_with(store));
  });
  EXPECT_THAT(errors, Each("rank 0: rank 2 has WORLD_SIZE 8, rank 0 has 3: start all ranks with one WORLD_SIZE"));
}

TEST(Meeting, ASmallerWorldOfRankZeroIsOneErrorEverywhere) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  const auto errors = errors_of(4, [&](int rank) {
    if (rank == 3) std::this_thread::sleep_for(300ms);  // the others have come by then, more than rank 0 expects
    connect_sockets(world_of(rank, rank == 0 ? 2 : 4), options_with(store));
  });
  EXPECT_THAT(errors, Each(errors[0]));
  EXPECT_THAT(errors[0], HasSubstr("has WORLD_SIZE 4, rank 0 has 2: start all ranks with one WORLD_SIZE"));
}

TEST(Meeting, TwoProcessesOfOneRankAreNamed) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  const auto errors =
      errors_of(3, [&](int thread) { connect_sockets(world_of(std::min(thread, 1), 3), options_with(store)); });
  EXPECT_THAT(errors, Each(HasSubstr("rank 0: two processes are rank 1")));
}

TEST(Meeting, AStoreThatNeverAnswersObeysTheTimeout) {
  struct Silent : c10d::HashStore {
    explicit Silent(std::shared_ptr<std::latch> until) : end(std::move(until)) {}
    std::shared_ptr<std::latch> end;
    void set(const std::string&, const std::vector<std::uint8_t>&) override { end->wait(); }
    bool check(const std::vector<std::string>&) override {
      end->wait();
      return false;
    }
  };
  const auto end = std::make_shared<std::latch>(1);
  const StorePtr store = c10::make_intrusive<Silent>(end);
  const auto errors = errors_of(2, [&](int rank) { connect_sockets(world_of(rank, 2), options_with(store, 300ms)); });
  end->count_down();
  EXPECT_THAT(errors[0], HasSubstr("the store failed: it does not answer"));
  EXPECT_THAT(errors[1], HasSubstr("at the store (it does not answer)"));
}

TEST(Meeting, WhatAStoreHoldsIsNotTrusted) {
  for (const std::string text :
       {"", "{", "[]", R"({"unix": 1})", R"({"unix": "", "port": 0, "addresses": ["127.0.0.1"]})",
        R"({"unix": "", "port": 1, "addresses": ["nowhere"]})"}) {
    const StorePtr store = c10::make_intrusive<c10d::HashStore>();
    store->set("dualpipe//dualpipe/0/rank 0", text);
    try {
      connect_sockets(world_of(1, 2), options_with(store, 100ms));
      ADD_FAILURE() << text;
    } catch (const CommError& error) {
      EXPECT_THAT(error.what(), HasSubstr("rank 0 cannot be reached within 100 ms at the store (")) << text;
    }
  }
}

TEST(Meeting, LoopbackAddressesAreTheLastToBeTold) {
  World world;
  world.master_port = 1;
  for (const std::string master : {"127.0.0.1", "127.0.1.1"}) {
    world.master_address = master;  // as a host's own name often is on this host
    const std::vector<std::string> addresses = detail::own_addresses(world);
    EXPECT_THAT(addresses, ::testing::Contains(StartsWith("127.")));
    EXPECT_TRUE(std::is_partitioned(addresses.begin(), addresses.end(), [](const std::string& address) {
      return !address.starts_with("127.");
    })) << ::testing::PrintToString(addresses);
  }
}

TEST(Meeting, SaysThatThereAreNoMoreDescriptors) {
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const int first_free = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  ::close(first_free);
  const int port = free_port();
  for (const int rank : {0, 1}) {
    std::vector<std::string> texts;
    // More of the connecting succeeds from one try to the next.
    for (int more = 0; more < 8; ++more) {
      rlimit limit = before;
      limit.rlim_cur = static_cast<rlim_t>(first_free + more);
      ::setrlimit(RLIMIT_NOFILE, &limit);
      try {
        connect_sockets(world_at(port, rank, 2), {.timeout = 100ms});
        texts.emplace_back("connected");
      } catch (const CommError& error) {
        texts.emplace_back(error.what());
      } catch (const std::exception& error) {
        texts.emplace_back(str("not a CommError: ", error.what()));
      }
      ::setrlimit(RLIMIT_NOFILE, &before);
    }
    EXPECT_THAT(texts, Each(StartsWith(str("rank ", rank, ": "))));
    EXPECT_THAT(texts.front(), HasSubstr("Too many open files"));
  }
}

// ---- several meetings at one place

TEST(Meeting, JobsAtOnePortDoNotMeet) {
  const int port = free_port();
  for (const Route route : {Route::best, Route::tcp}) {
    const auto errors = errors_of(6, [&](int thread) {
      World world = world_at(port, thread / 2, 3);
      world.run_id = thread % 2 == 0 ? "one" : "other";
      connect_and_sum(world, {.timeout = 60s}, route);
    });
    EXPECT_THAT(errors, Each(""));
  }
}

/// Takes a port at all addresses, and never answers there. @return a descriptor
int silent_at(int port) {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  if (::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 || ::listen(fd, 10) != 0)
    throw Error("cannot listen");
  return fd;
}

/// One by which others would know this host; a loopback address if it has no other.
std::string address_of_this_host() {
  World world;
  world.master_port = 1;
  return detail::own_addresses(world).front();
}

TEST(Meeting, APortThatIsTakenBySomebodySilentObeysTheTimeout) {
  const int port = free_port();
  const int fd = silent_at(port);
  const auto errors =
      errors_of(2, [&](int rank) { detail::connect_sockets(world_at(port, rank, 2), {.timeout = 500ms}, Route::tcp); });
  ::close(fd);
  EXPECT_THAT(errors[0], AllOf(HasSubstr(str("cannot listen at 127.0.0.1:", port)), HasSubstr("taken for 500 ms"),
                               HasSubstr("MASTER_PORT")));
  EXPECT_THAT(errors[1], HasSubstr(str("rank 0 cannot be reached within 500 ms at 127.0.0.1:", port,
                                       " (no answer): it has not started or has ended or is stopped")));
}

/// As under torchrun. Whoever looks for rank 0 there is neither kept from its own deadline nor asks ever more often.
TEST(Meeting, ALaunchersStoreThatIsSilentIsCalledOnce) {
  World world = world_at(free_port(), 1, 2);
  world.launcher_hosts_store = true;
  const int fd = silent_at(world.master_port);
  const auto errors = errors_of(1, [&](int) { connect_sockets(world, {.timeout = 2500ms}); });
  EXPECT_THAT(errors[0], HasSubstr(str("rank 0 cannot be reached within 2500 ms at the store (the launcher's store at "
                                       "127.0.0.1:",
                                       world.master_port, " does not answer)")));
  ASSERT_EQ(::fcntl(fd, F_SETFL, O_NONBLOCK), 0);
  int calls = 0;
  for (int call; (call = ::accept(fd, nullptr, nullptr)) >= 0; ::close(call)) ++calls;
  ::close(fd);
  EXPECT_EQ(calls, 1);
}

/// In meetings to which ranks may come from other hosts. Those of this host come through the Unix domain socket.
TEST(Meeting, WhileRankZeroWaitsForItsPortTheOthersAreHeardAndTold) {
  const std::string address = address_of_this_host();
  if (asio::ip::make_address(address).is_loopback()) GTEST_SKIP() << "this host has no other address";
  const int port = free_port();
  const int fd = silent_at(port);
  const auto world = [&](int rank) {
    World result = world_at(port, rank, 3);
    result.master_address = address;
    return result;
  };
  auto errors = errors_of(3, [&](int rank) {
    if (rank == 2)
      meet(world(rank), {.timeout = 60s}, [](Meeting&) { throw CommError(2, "rendezvous", "rank 2 has no disk"); });
    connect_sockets(world(rank), {.timeout = 60s});
  });
  EXPECT_THAT(errors, Each("rank 2 has no disk"));
  errors = errors_of(3, [&](int rank) { connect_sockets(world(rank), {.timeout = rank == 0 ? 1500ms : 60s}); });
  EXPECT_THAT(errors,
              Each(StartsWith(str("rank 0: cannot listen at ", address, ":", port, ", which was taken for 1500"))));
  errors = errors_of(3, [&](int rank) { connect_sockets(world(rank), {.timeout = rank == 0 ? 60s : 1500ms}); });
  EXPECT_THAT(errors, Each(HasSubstr(str("rank 0 cannot listen at ", address, ":", port, ", which is taken"))));
  ::close(fd);
}

// ---- strangers

int connected_to(int port) {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  for (int tries = 0; ::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0; ++tries) {
    if (tries > 5000) throw Error("no listener");
    std::this_thread::sleep_for(1ms);
  }
  return fd;
}

TEST(Meeting, StrangersChangeNothing) {
  for (const bool encryption : {false, true}) {
    const int port = free_port();
    std::vector<int> strangers;
    const auto errors = errors_of(2, [&](int rank) {
      World world = world_at(port, rank, 2);
      world.secret = "a secret of the tests";
      if (rank == 1) {
        // More of them than are listened to at a time, silent or talking.
        for (int i = 0; i < 200; ++i) {
          strangers.push_back(connected_to(port));
          const std::string text = i % 3 == 0 ? "" : i % 3 == 1 ? "GET / HTTP/1.1\r\n\r\n" : std::string(1 << 12, 'x');
          ::send(strangers.back(), text.data(), text.size(), MSG_NOSIGNAL);
        }
      }
      connect_and_sum(world, {.timeout = 60s, .encryption = encryption}, Route::tcp);
    });
    for (const int fd : strangers) ::close(fd);
    EXPECT_THAT(errors, Each(""));
  }
}

TEST(Meeting, WhoHasAnotherSecretIsNotLetIn) {
  const StorePtr store = c10::make_intrusive<c10d::HashStore>();
  for (const Route route : {Route::best, Route::tcp}) {
    const auto errors = errors_of(2, [&](int rank) {
      World world = world_of(rank, 2);
      world.secret = rank == 0 ? "the secret of this job" : "another secret";
      world.run_id = str(static_cast<int>(route));
      detail::connect_sockets(world, options_with(store, 1500ms), route);
    });
    EXPECT_THAT(errors[0], HasSubstr("no sign of rank 1"));
    EXPECT_THAT(errors[1], AllOf(HasSubstr("rank 0 cannot be reached"), ::testing::Not(HasSubstr("the secret of"))));
  }
}

/// Plays rank 0 of a job without a secret, at a port of this host, and sends those who come what a test wants.
class FalseRankZero {
 public:
  FalseRankZero(const World& world, const ConnectOptions& options, std::vector<nlohmann::json> messages)
      : messages_(std::move(messages)),
        listener_(io_, introduction(world, options), 1, [this](detail::Contact contact) {
          came_ = true;
          const auto ignore = [](const auto&) {};
          line_ = std::make_shared<detail::Line>(std::move(contact.socket), ignore, ignore);
          line_->start();
          for (const nlohmann::json& message : messages_) line_->send(message);
        }) {
    port_ = listener_.listen_at({asio::ip::tcp::v4(), 0});
    thread_ = std::jthread([this] { io_.run(); });
  }
  ~FalseRankZero() {
    io_.stop();
    thread_.join();
  }
  int port() const { return port_; }
  bool has_somebody_come() const { return came_; }

 private:
  static detail::Introduction introduction(const World& world, const ConnectOptions& options) {
    detail::Greeting greeting;
    greeting.size = world.size;
    greeting.meeting =
        detail::authentication_code("", {"meeting", world.run_id, options.name, std::to_string(options.epoch)});
    return {.own = greeting, .key = "", .check = [](const auto&, const auto&) { return std::string(); }};
  }

  asio::io_context io_;
  const std::vector<nlohmann::json> messages_;
  std::shared_ptr<detail::Line> line_;
  std::atomic<bool> came_{false};
  detail::Listener listener_;
  int port_ = 0;
  std::jthread thread_;
};

std::string error_of(const World& world, const ConnectOptions& options, Route route = Route::best) {
  return errors_of(1, [&](int) { detail::connect_sockets(world, options, route); }).front();
}

TEST(Meeting, WithoutASecretRankZeroOfThisHostAnswersThroughTheUnixSocketOnly) {
  World world = world_of(1, 2);
  ConnectOptions options{.timeout = 1500ms};
  const FalseRankZero stranger(world, options, {});
  // The place is in a store, and all ranks are on this host.
  options.store = c10::make_intrusive<c10d::HashStore>();
  options.store->set("dualpipe//dualpipe/0/rank 0",
                     nlohmann::json({{"unix", ""}, {"port", stranger.port()}, {"addresses", {"127.0.0.1"}}}).dump());
  EXPECT_THAT(error_of(world, options), HasSubstr("at the store (it holds no place to meet at)"));
  EXPECT_FALSE(stranger.has_somebody_come());
  // Ranks may be elsewhere.
  world.local_size = 1;
  EXPECT_THAT(error_of(world, options), AllOf(HasSubstr(str("127.0.0.1:", stranger.port(), " (on this host")),
                                              HasSubstr("DUALPIPE_SECRET_FILE")));
  options.store = {};
  world.master_address = address_of_this_host();
  world.master_port = stranger.port();
  if (asio::ip::make_address(world.master_address).is_loopback()) return;  // this host has no other address
  EXPECT_THAT(error_of(world, options), HasSubstr("(on this host"));
  EXPECT_FALSE(stranger.has_somebody_come());
}

TEST(Meeting, NamesARankZeroThatSendsSomethingMalformed) {
  const nlohmann::json session = {{"session", std::string(64, '0')}};
  for (const std::string text :
       {"7", "{}", R"({"session": 7})", R"({"all": []})", R"({"all": ["", "", ""]})", R"({"all": [1, 2]})",
        R"({"missing": [2], "lacks": ""})", R"({"missing": [-1], "lacks": ""})", R"({"missing": [0.5], "lacks": ""})",
        R"({"missing": [1e30], "lacks": ""})", R"({"missing": [0]})", R"({"failed": {"origin": "0", "reason": ""}})",
        R"({"failed": {"origin": 1e30, "reason": ""}})", R"({"failed": {"origin": 0}})"}) {
    World world = world_of(1, 2);
    const ConnectOptions options{.timeout = 60s};
    const FalseRankZero rank_zero(world, options, {session, nlohmann::json::parse(text)});
    world.master_port = rank_zero.port();
    EXPECT_THAT(error_of(world, options, Route::tcp), HasSubstr("sends something malformed")) << text;
  }
}

TEST(Meeting, AnOriginOutsideOfTheWorldIsUnknown) {
  World world = world_of(1, 2);
  const ConnectOptions options{.timeout = 60s};
  for (const std::int64_t origin : {std::int64_t{-7}, std::int64_t{2}, std::int64_t{1'000'000'000'000}}) {
    const nlohmann::json failed = {{"failed", {{"origin", origin}, {"reason", "no disk"}}}};
    const FalseRankZero rank_zero(world, options, {failed});
    world.master_port = rank_zero.port();
    try {
      detail::connect_sockets(world, options, Route::tcp);
      ADD_FAILURE();
    } catch (const CommError& error) {
      EXPECT_STREQ(error.what(), "no disk");
      EXPECT_EQ(error.origin_rank(), -1);
    }
  }
}

/// The end of a handshake with a listener that has `key`, of a caller that has `callers_key`.
std::string handshake_problem(const std::string& key, const std::string& callers_key, std::uint32_t version) {
  asio::io_context io;
  asio::local::stream_protocol::socket listening(io), calling(io);
  asio::local::connect_pair(listening, calling);
  std::optional<std::string> problem;
  std::atomic<bool> let_in{false};
  const auto fine = [](const detail::Greeting&) { return std::string(); };
  detail::Greeting greeting;
  const auto listener = std::make_shared<detail::Handshake>(
      io, std::move(listening), detail::Handshake::Side::listener, greeting, key, fine,
      [&](detail::Handshake&, const std::string& why) { let_in = why.empty(); });
  greeting.version = version;
  const auto caller = std::make_shared<detail::Handshake>(
      io, std::move(calling), detail::Handshake::Side::caller, greeting, callers_key, fine,
      [&](detail::Handshake&, const std::string& why) { problem = why; });
  listener->start();
  caller->start();
  while (!problem && io.run_one_for(10s) > 0) {
  }
  io.poll();
  EXPECT_EQ(let_in, problem == "");
  return problem.value_or("nothing");
}

TEST(Meeting, AnEndThatDiesWithUnreadBytesHasClosedItsConnection) {
  asio::io_context io;
  asio::local::stream_protocol::socket here(io), there(io);
  asio::local::connect_pair(here, there);
  std::optional<std::string> why;
  const auto line = std::make_shared<detail::Line>(
      std::move(here), [](const nlohmann::json&) {}, [&](const std::string& reason) { why = reason; });
  line->start();
  line->send(nlohmann::json("never read"));
  io.poll();
  there.close();  // the kernel tells of a reset, and not of an end
  while (!why && io.run_one_for(10s) > 0) {
  }
  EXPECT_EQ(why, "");
}

/// As one with an IPv6 address is for a kernel without it.
TEST(Meeting, APlaceOfAnUnknownKindIsPassedOver) {
  asio::io_context io;
  const auto check = [](const auto&, const auto&) { return std::string(); };
  bool admitted = false, connected = false;
  detail::Listener listener(io, {.own = {}, .key = "", .check = check}, 1, [&](detail::Contact) { admitted = true; });
  const std::string name = detail::random_unix_name();
  listener.listen_here(name);
  const sockaddr unknown{.sa_family = 200, .sa_data = {}};
  const auto caller = std::make_shared<detail::Caller>(
      io, detail::Introduction{.own = {}, .key = "", .check = check},
      [&] {
        return std::vector<detail::Place>{
            {"somewhere", asio::generic::stream_protocol::endpoint(&unknown, sizeof unknown), ""},
            {"here", detail::unix_endpoint(name), ""}};
      },
      [&](detail::Contact) { connected = true; });
  caller->start();
  while (!(admitted && connected) && io.run_one_for(10s) > 0) {
  }
  EXPECT_TRUE(admitted && connected) << caller->outcomes();
  EXPECT_THAT(caller->outcomes(), HasSubstr("somewhere (cannot make a socket: Address family not supported"));
}

TEST(Meeting, HandshakesProveTheKeyAndTheVersion) {
  const std::uint32_t version = detail::wire::protocol_version;
  EXPECT_EQ(handshake_problem("key", "key", version), "");
  EXPECT_EQ(handshake_problem("", "", version), "");
  EXPECT_EQ(handshake_problem("key", "yek", version), "it closes the connection");
  EXPECT_EQ(handshake_problem("key", "", version), "it closes the connection");
  EXPECT_EQ(handshake_problem("key", "key", version + 1), str("it speaks protocol version ", version, ", this rank ",
                                                              version + 1, ": start all ranks from one build"));
}

TEST(Meeting, AListenerThatOnlyRepeatsHasNotTheKey) {
  asio::io_context io;
  asio::local::stream_protocol::socket mirror(io), calling(io);
  asio::local::connect_pair(mirror, calling);
  std::optional<std::string> problem;
  const auto caller = std::make_shared<detail::Handshake>(
      io, std::move(calling), detail::Handshake::Side::caller, detail::Greeting(), "key",
      [](const detail::Greeting&) { return std::string(); },
      [&](detail::Handshake&, const std::string& why) { problem = why; });
  caller->start();
  std::jthread echo([&] {
    char bytes[256];
    for (ssize_t size; (size = ::read(mirror.native_handle(), bytes, sizeof bytes)) > 0;)
      if (::write(mirror.native_handle(), bytes, size) != size) break;
  });
  while (!problem && io.run_one_for(10s) > 0) {
  }
  ::shutdown(mirror.native_handle(), SHUT_RDWR);
  EXPECT_EQ(problem, "it does not have the secret of this job");
}

/// Runs `body` in a process of the user nobody; it may only use system calls. @return its pid
template <class Body>
pid_t as_nobody(const Body& body) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(::setuid(65534) == 0 ? body() : 100);
  return child;
}

sockaddr_un abstract_address(const std::string& name, socklen_t& size) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::copy(name.begin(), name.end(), address.sun_path + 1);
  size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

TEST(Meeting, ACallerOfAnotherUserIsNotListenedTo) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can start a process of another user";
  asio::io_context io;
  const std::string name = str("dualpipe.test.", ::getpid());
  bool admitted = false;
  detail::Listener listener(io, {.own = {}, .key = "", .check = [](const auto&, const auto&) { return std::string(); }},
                            1, [&](detail::Contact) { admitted = true; });
  listener.listen_here(name);
  socklen_t size = 0;
  const sockaddr_un address = abstract_address(name, size);
  const pid_t stranger = as_nobody([&] {
    const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
    if (::connect(fd, reinterpret_cast<const sockaddr*>(&address), size) != 0) return 1;
    char byte;
    return ::read(fd, &byte, 1) == 0 ? 0 : 2;  // the connection is closed without a word
  });
  int status = 0;
  const auto limit = std::chrono::steady_clock::now() + 30s;
  while (::waitpid(stranger, &status, WNOHANG) == 0 && std::chrono::steady_clock::now() < limit) io.run_for(10ms);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_FALSE(admitted);
}

TEST(Meeting, AListenerOfAnotherUserIsNotTold) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can start a process of another user";
  socklen_t size = 0;
  const sockaddr_un address = abstract_address(str("dualpipe.test.other.", ::getpid()), size);
  const pid_t stranger = as_nobody([&] {
    const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
    if (::bind(fd, reinterpret_cast<const sockaddr*>(&address), size) != 0 || ::listen(fd, 1) != 0) return 1;
    for (;;) ::pause();
  });
  asio::io_context io;
  detail::StreamSocket socket(io, asio::generic::stream_protocol(asio::local::stream_protocol()),
                              ::socket(AF_UNIX, SOCK_STREAM, 0));
  int tries = 0;
  while (::connect(socket.native_handle(), reinterpret_cast<const sockaddr*>(&address), size) != 0 && ++tries < 5000)
    std::this_thread::sleep_for(1ms);
  EXPECT_EQ(detail::stranger_at(socket), "a process of user 65534, this one is of user 0");
  ::kill(stranger, SIGKILL);
  ::waitpid(stranger, nullptr, 0);
}

TEST(Meeting, EncryptionNeedsASecret) {
  World world = world_at(free_port(), 0, 2);
  try {
    connect_sockets(world, {.timeout = 1s, .encryption = true});
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_THAT(error.what(), HasSubstr("DUALPIPE_SECRET_FILE"));
  }
}

/// Forwards all connections from one port to another, and keeps what passes.
class ManInTheMiddle {
 public:
  ManInTheMiddle(int from, int to) : to_(to) {
    const int on = 1;
    ::setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<std::uint16_t>(from));
    if (::bind(listener_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
        ::listen(listener_, 10) != 0)
      throw Error("cannot listen");
    accepting_ = std::jthread([this] {
      for (int near; (near = ::accept(listener_, nullptr, nullptr)) >= 0;) forward(near);
    });
  }
  ~ManInTheMiddle() {
    ::shutdown(listener_, SHUT_RDWR);
    accepting_.join();
    for (const int fd : ends_) ::shutdown(fd, SHUT_RDWR);
    copying_.clear();
    for (const int fd : ends_) ::close(fd);
    ::close(listener_);
  }
  std::string seen() const {
    const std::lock_guard lock(mutex_);
    return seen_;
  }

 private:
  void forward(int near) {
    ends_.push_back(near);
    try {
      ends_.push_back(connected_to(to_));
    } catch (const Error&) {
      ::shutdown(near, SHUT_RDWR);
      return;
    }
    copying_.emplace_back([this, near, far = ends_.back()] { copy(near, far); });
    copying_.emplace_back([this, near, far = ends_.back()] { copy(far, near); });
  }
  void copy(int from, int to) {
    char bytes[4096];
    for (ssize_t size; (size = ::read(from, bytes, sizeof bytes)) > 0;) {
      {
        const std::lock_guard lock(mutex_);
        seen_.append(bytes, static_cast<std::size_t>(size));
      }
      if (::send(to, bytes, static_cast<std::size_t>(size), MSG_NOSIGNAL) != size) break;
    }
    ::shutdown(to, SHUT_WR);
  }

  const int to_;
  const int listener_ = ::socket(AF_INET, SOCK_STREAM, 0);
  mutable std::mutex mutex_;  // guards seen_
  std::string seen_;
  std::vector<int> ends_;  // used by the accepting thread
  std::vector<std::jthread> copying_;
  std::jthread accepting_;
};

TEST(Meeting, WhatIsEncryptedCannotBeReadOnTheWay) {
  for (const bool encryption : {false, true}) {
    const int port = free_port();
    int middle = free_port();
    while (middle == port) middle = free_port();
    const ManInTheMiddle man(middle, port);
    const auto errors = errors_of(2, [&](int rank) {
      World world = world_at(rank == 0 ? port : middle, rank, 2);
      world.secret = "a secret of the tests";
      connect_and_sum(world, {.timeout = 60s, .encryption = encryption}, Route::tcp);
    });
    EXPECT_THAT(errors, Each(""));
    EXPECT_GT(man.seen().size(), 0u);
    EXPECT_EQ(count(man.seen(), "session") == 0, encryption);
    EXPECT_EQ(count(man.seen(), "a secret of the tests"), 0u);
  }
}

// ---- ranks that are processes

class MeetingProcesses : public ::testing::TestWithParam<std::tuple<int, int>> {
 protected:
  /// Rank `struck` is struck while the others wait in the meeting for the last rank, which is late.
  void expect_named(const std::string& mode, const std::string& what, const std::vector<std::string>& flags = {}) {
    const auto [ranks, struck] = GetParam();
    const test::TemporaryFolder folder;
    auto command = run(ranks, mode, flags);
    command.insert(command.end(), {std::to_string(struck), folder.path().string()});
    Process processes(command);
    EXPECT_NE(processes.wait(), 0);
    // The rank that is late is ended by the launcher, or finds nobody.
    EXPECT_GE(count(processes.out(), str("origin ", struck, " ")), static_cast<std::size_t>(ranks - 2))
        << processes.out() << processes.err();
    EXPECT_EQ(count(processes.out(), "origin "), count(processes.out(), str("origin ", struck, " ")))
        << processes.out() << processes.err();
    EXPECT_THAT(processes.out(), HasSubstr(str("rank ", struck, " ", what)));
  }
};

TEST_P(MeetingProcesses, AKilledRankIsNamed) {
  expect_named("meeting-killed", "closed its connection while the ranks were meeting (killed?)");
}

TEST_P(MeetingProcesses, AStoppedRankIsNamed) {
  expect_named("meeting-stopped", "has given no sign of life for 3000 ms while the ranks were meeting",
               {"--grace", "0.1"});
}

INSTANTIATE_TEST_SUITE_P(Ranks, MeetingProcesses,
                         ::testing::Values(std::tuple(4, 0), std::tuple(4, 1), std::tuple(8, 5)),
                         [](const auto& test) { return str(std::get<0>(test.param), "_", std::get<1>(test.param)); });

/// As a scheduler does it. The gap in one's own clock is not the others' fault.
TEST(MeetingProcesses, AJobThatIsSuspendedGoesOn) {
  Process ranks(run(4, "suspended"));
  EXPECT_EQ(ranks.wait(), 0) << ranks.err();
  EXPECT_EQ(count(ranks.out(), "fine"), 4u) << ranks.out();
}

}  // namespace
}  // namespace dualpipe
