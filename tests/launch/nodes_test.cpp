// A run that spans two hosts: dualpipe-run, torchrun and Slurm's variables start it, TCP crosses the hosts, and the
// result is that of one process.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <regex>
#include <sstream>
#include <string>
#include <vector>

#include "launch/two_nodes.hpp"

namespace dualpipe {
namespace {

using namespace std::chrono_literals;
using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::Each;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::Process;
using testing::TwoNodes;
using Command = std::vector<std::string>;
using Variables = std::vector<std::pair<std::string, std::string>>;

constexpr int ranks_per_node = 2;
constexpr int num_ranks = 2 * ranks_per_node;
constexpr const char* master_port = "29500";

Command join(Command first, const Command& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

/// What starts the ranks of one node.
Command dualpipe_run(int node, int ranks, Command flags) {
  flags.insert(flags.begin(), {DUALPIPE_RUN, "-n", std::to_string(ranks), "--nnodes", "2", "--node-rank",
                               std::to_string(node), "--rendezvous", std::string("node0:") + master_port});
  flags.push_back("--");
  return flags;
}
Command dualpipe_run(int node) { return dualpipe_run(node, ranks_per_node, {}); }
Command torchrun(int node) {
  return {TORCHRUN,
          "--nnodes",
          "2",
          "--node-rank",
          std::to_string(node),
          "--nproc-per-node",
          std::to_string(ranks_per_node),
          "--master-addr",
          "node0",
          "--master-port",
          master_port,
          "--no-python"};
}

class Nodes : public ::testing::Test {
 protected:
  void SetUp() override {
    try {
      nodes = std::make_unique<TwoNodes>();
    } catch (const std::exception& error) {
      GTEST_SKIP() << error.what();
    }
  }

  /// The same program on both nodes.
  void start(Command (*launcher)(int node), const Command& program) {
    for (const int node : {0, 1})
      launches.push_back(std::make_unique<Process>(nodes->on(node, join(launcher(node), program))));
  }
  void expect_success(std::chrono::milliseconds timeout = 60s) {
    for (const auto& launch : launches) EXPECT_EQ(launch->wait(timeout), 0) << launch->out() << launch->err();
  }
  std::string text(std::size_t node) const { return launches.at(node)->out() + launches.at(node)->err(); }

  std::unique_ptr<TwoNodes> nodes;
  std::vector<std::unique_ptr<Process>> launches;  // ended before the nodes
};

// ---- the language model

class NodesLanguageModel : public Nodes {
 protected:
  NodesLanguageModel() {
    std::ofstream out(folder / "text.txt");
    for (int i = 0; i < 2000; ++i) out << "int add" << i % 7 << "(int a, int b) { return a + b; }\n";
  }
  void TearDown() override { launches.clear(); }  // they write into the folder

  Command model(const std::string& schedule, int steps) const {
    return {DUALPIPE_LM,
            "--schedule",
            schedule,
            "--microbatches",
            "8",
            "--steps",
            std::to_string(steps),
            "--minutes",
            "0",
            "--progress",
            "0",
            "--layers",
            "6",
            "--width",
            "16",
            "--heads",
            "2",
            "--context",
            "16",
            "--held-out",
            "1",
            "--sample",
            "0",
            "--text",
            (folder / "text.txt").string(),
            "--svg",
            (folder / "run.svg").string(),
            "--trace",
            (folder / "run.json").string()};
  }
  /// What four steps give in one process.
  std::vector<double> expected_losses() const {
    Process alone(model("gpipe", 4), {{"RANK", ""}, {"WORLD_SIZE", ""}});
    EXPECT_EQ(alone.wait(), 0) << alone.out() << alone.err();
    EXPECT_THAT(alone.out(), HasSubstr("gpipe on 1 ranks"));
    return losses(alone.out());
  }
  static std::vector<double> losses(const std::string& output) {
    std::vector<double> found;
    const std::regex number("(?:step [0-9]+  loss|held-out loss:) ([0-9.]+)");
    for (std::sregex_iterator it(output.begin(), output.end(), number), end; it != end; ++it)
      found.push_back(std::stod((*it)[1]));
    return found;
  }
  /// Rank 0, which is on the first node, has printed the losses of one process.
  void expect_losses_of_one_process() {
    const std::vector<double> expected = expected_losses(), got = losses(launches[0]->out());
    ASSERT_EQ(expected.size(), 5u);
    ASSERT_EQ(got.size(), expected.size()) << text(0);
    for (std::size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], expected[i], 1.5e-3) << "loss " << i;
    EXPECT_LT(got.back(), got.front()) << "it learns";
    EXPECT_THAT(launches[0]->out(), HasSubstr("dualpipe on 4 ranks"));
  }

  dualpipe::test::TemporaryFolder folder;
};

TEST_F(NodesLanguageModel, TrainsAsOneProcessUnderDualpipeRun) {
  start(dualpipe_run, model("dualpipe", 4));
  expect_success();
  expect_losses_of_one_process();
}

TEST_F(NodesLanguageModel, TrainsAsOneProcessUnderTorchrun) {
  if (!std::filesystem::exists(TORCHRUN)) GTEST_SKIP() << "there is no " << TORCHRUN;
  start(torchrun, model("dualpipe", 4));
  expect_success(100s);
  expect_losses_of_one_process();
}

TEST_F(NodesLanguageModel, TrainsAsOneProcessUnderSlurmsVariables) {
  for (int rank = 0; rank < num_ranks; ++rank) {
    const int node = rank / ranks_per_node;
    const Variables slurm = {{"SLURM_PROCID", std::to_string(rank)},
                             {"SLURM_NTASKS", std::to_string(num_ranks)},
                             {"SLURM_LOCALID", std::to_string(rank % ranks_per_node)},
                             {"SLURM_NODEID", std::to_string(node)},
                             {"SLURM_TASKS_PER_NODE", std::to_string(ranks_per_node) + "(x2)"},
                             {"SLURM_STEP_NODELIST", "node[0-1]"},
                             {"SLURM_JOB_ID", "4711"},
                             {"SLURM_STEP_ID", "0"},
                             {"OMP_NUM_THREADS", "1"}};
    launches.push_back(std::make_unique<Process>(nodes->on(node, model("dualpipe", 4)), slurm));
  }
  expect_success();
  expect_losses_of_one_process();
}

TEST_F(NodesLanguageModel, AKilledNodeIsNamedOnTheOther) {
  start(dualpipe_run, model("dualpipe", 1'000'000));
  ASSERT_TRUE(launches[0]->wait_for_output("step 2 ")) << text(0) << text(1);
  launches[1]->signal(SIGKILL);  // its ranks do not outlive it
  EXPECT_EQ(launches[0]->wait(), 1) << text(0);
  for (const char* rank : {"rank 0: ", "rank 1: "}) EXPECT_THAT(launches[0]->err(), HasSubstr(rank));
  EXPECT_TRUE(std::regex_search(launches[0]->err(),
                                std::regex("rank [23] closed its connection without saying goodbye \\(killed\\?\\)")))
      << text(0);
}

// ---- what travels where

/// "0100000A" or its mapping into IPv6, as the kernel prints addresses, is 10.0.0.1.
std::string readable(const std::string& hex) {
  const unsigned long bytes = std::stoul(hex.substr(hex.size() - 8), nullptr, 16);
  std::ostringstream out;
  for (int i = 0; i < 4; ++i) out << (i == 0 ? "" : ".") << (bytes >> (8 * i) & 0xff);
  return out.str();
}

/// The far ends of a node's TCP connections, but for those of the meeting.
std::vector<std::string> far_ends(const TwoNodes& nodes, int node) {
  std::vector<std::string> found;
  for (const char* file : {"tcp", "tcp6"}) {
    std::istringstream lines(nodes.network_file(node, file));
    std::string line, index, local, remote, state;
    for (std::getline(lines, line); std::getline(lines, line);) {
      std::istringstream(line) >> index >> local >> remote >> state;
      const auto port = [](const std::string& end) { return std::stoi(end.substr(end.find(':') + 1), nullptr, 16); };
      const bool established = state == "01";
      if (established && port(local) != std::stoi(master_port) && port(remote) != std::stoi(master_port))
        found.push_back(readable(remote.substr(0, remote.find(':'))));
    }
  }
  return found;
}

/// Connections that a node's ranks have accepted on Unix domain sockets; they bear the name of the listener.
std::size_t unix_connections(const TwoNodes& nodes, int node) {
  std::istringstream lines(nodes.network_file(node, "unix"));
  std::size_t count = 0;
  for (std::string line; std::getline(lines, line);) count += line.find(" @dualpipe.") != std::string::npos ? 1 : 0;
  return count;
}

TEST_F(Nodes, TcpCrossesThemUnixSocketsStayWithin) {
  start(dualpipe_run, {SOCKET_RANK, "endless"});
  for (const int node : {0, 1})
    for (int rank = ranks_per_node * node; rank < ranks_per_node * (node + 1); ++rank)
      ASSERT_TRUE(launches[node]->wait_for_output("[" + std::to_string(rank) + "] exchanging")) << text(node);
  for (const int node : {0, 1}) {
    // Each of two ranks with each of the other two, who say where they are by an address that leads there.
    EXPECT_THAT(far_ends(*nodes, node), AllOf(::testing::SizeIs(4), Each(TwoNodes::address(1 - node))));
    EXPECT_EQ(unix_connections(*nodes, node), 1u) << "two ranks with each other";
  }
}

TEST_F(Nodes, GradientsEqualOneProcess) {
  start(dualpipe_run, {RANK_TEST, "--gtest_filter=Rank.GradientsEqual*"});
  expect_success(100s);
  EXPECT_THAT(text(0), HasSubstr("[0] [  PASSED  ] 1 test."));
  EXPECT_THAT(text(1), HasSubstr("[3] [  PASSED  ] 1 test."));
}

TEST_F(Nodes, ACutCableIsNoticedByTheDeadline) {
  start(dualpipe_run, {SOCKET_RANK, "endless"});
  for (const int node : {0, 1}) ASSERT_TRUE(launches[node]->wait_for_output("exchanging")) << text(node);
  nodes->cut_cable();
  for (const int node : {0, 1}) {
    EXPECT_EQ(launches[node]->wait(30s), 1) << text(node);
    const std::string waited = node == 0 ? "waited for rank [23]" : "waited for rank [01]";
    EXPECT_TRUE(std::regex_search(text(node), std::regex(waited + " longer than the timeout of 4000 ms")))
        << text(node);
  }
}

TEST_F(Nodes, AMeetingPlaceOutOfReachIsNamed) {
  const auto error_with = [&](const std::string& rendezvous) {
    Process launch(nodes->on(1, {DUALPIPE_RUN, "-n", "1", "--nnodes", "2", "--node-rank", "1", "--rendezvous",
                                 rendezvous, "--", SOCKET_RANK, "endless"}));
    EXPECT_EQ(launch.wait(30s), 1);
    return launch.err();
  };
  EXPECT_THAT(error_with("node0:29501"),
              HasSubstr("rank 1: rank 0 cannot be reached within 4000 ms at node0:29501 (Connection refused)"));
  EXPECT_THAT(error_with("nowhere:29501"),
              AllOf(HasSubstr("nowhere:29501"), HasSubstr("Host not found"), HasSubstr("--rendezvous")));
  nodes->cut_cable();
  EXPECT_THAT(error_with("node0:29501"), HasSubstr("within 4000 ms at node0:29501 (Network is unreachable)"));
}

// ---- ranks that end before they meet others

/// A rank that ends before it connects; all others find out whom they miss.
struct Absence {
  int ranks_per_node = 1;
  int absent = 0;
  int after = 0;           ///< how many seconds it lives
  int late = -1;           ///< a rank that comes two seconds later; -1: none
  bool encrypted = false;  ///< and a communicator of another name
};

class NodesMissed : public Nodes {
 protected:
  void start_node(int node, int ranks, const Command& program, const Variables& variables = {}) {
    launches.push_back(std::make_unique<Process>(
        nodes->on(node, join(dualpipe_run(node, ranks, {"--wait-before-term", "0.7"}), program)), variables));
  }
  /// Everybody knows, so nobody is looked for.
  void expect_no_waiting(int node) const {
    EXPECT_THAT(text(node), AllOf(Not(HasSubstr("were not told")), Not(HasSubstr("found no rank 0")))) << text(node);
  }
};

class NodesAbsence : public NodesMissed, public ::testing::WithParamInterface<Absence> {};

/// The launcher of its node stands in for it, also where it was the only rank there or the others have been ended.
TEST_P(NodesAbsence, IsToldToTheOtherNode) {
  const Absence& p = GetParam();
  const dualpipe::test::TemporaryFolder folder;
  const std::filesystem::path secret = folder.path() / "secret";
  std::ofstream(secret) << "the secret of this test";
  std::filesystem::permissions(secret, std::filesystem::perms::owner_read);
  const std::string script = "[ $RANK = " + std::to_string(p.absent) + " ] && sleep " + std::to_string(p.after) +
                             " && exit 3; [ $RANK = " + std::to_string(p.late) +
                             " ] && sleep 2; exec " SOCKET_RANK " meets " + (p.encrypted ? "another" : "dualpipe");
  for (const int node : {0, 1})
    start_node(node, p.ranks_per_node, {"sh", "-c", script},
               p.encrypted ? Variables{{"DUALPIPE_SECRET_FILE", secret}} : Variables{});
  const std::string name = "rank " + std::to_string(p.absent);
  const int node = p.absent / p.ranks_per_node;
  EXPECT_EQ(launches[node]->wait(30s), 3);
  EXPECT_THAT(text(node), HasSubstr("dualpipe-run: " + name + " failed first: exit code 3"));
  expect_no_waiting(node);
  EXPECT_EQ(launches[1 - node]->wait(30s), 1);
  EXPECT_THAT(text(1 - node),
              AllOf(HasSubstr(name + " ended before it met the others: exit code 3"),
                    HasSubstr("dualpipe-run: " + name + " on node " + std::to_string(node) + " failed first")));
  expect_no_waiting(1 - node);
}

INSTANTIATE_TEST_SUITE_P(All, NodesAbsence,
                         ::testing::Values(Absence{.absent = 0}, Absence{.absent = 1}, Absence{.absent = 0, .late = 1},
                                           Absence{.absent = 1, .late = 0}, Absence{.absent = 0, .encrypted = true},
                                           Absence{.absent = 1, .encrypted = true},
                                           Absence{.ranks_per_node = 2, .absent = 0, .late = 1},
                                           Absence{.ranks_per_node = 2, .absent = 2, .late = 3},
                                           Absence{.ranks_per_node = 2, .absent = 3, .late = 0},
                                           Absence{.ranks_per_node = 2, .absent = 2, .after = 1},
                                           Absence{.ranks_per_node = 2, .absent = 0, .after = 1}),
                         [](const auto& param) {
                           const Absence& p = param.param;
                           return "Rank" + std::to_string(p.absent) + "Of" + std::to_string(2 * p.ranks_per_node) +
                                  (p.after > 0 ? "Later" : "") + (p.late >= 0 ? "Late" + std::to_string(p.late) : "") +
                                  (p.encrypted ? "Encrypted" : "");
                         });

TEST_F(NodesMissed, ANodeThatCannotStartItsRanksSaysSo) {
  start_node(0, 1, {SOCKET_RANK, "meets", "dualpipe"});
  start_node(1, 1, {"/no/such/program"});
  EXPECT_EQ(launches[1]->wait(30s), 127);
  EXPECT_EQ(launches[0]->wait(30s), 1);
  EXPECT_THAT(text(0), HasSubstr("rank 1 ended before it met the others: cannot run '/no/such/program': No such file"));
}

/// A mistake in the command line, say: launchers tell each other, and none waits for ranks that never come.
TEST_F(NodesMissed, AllOfThemWaitForNobody) {
  for (const int node : {0, 1}) start_node(node, 2, {"sh", "-c", "exit 3"});
  for (const int node : {0, 1}) {
    EXPECT_EQ(launches[node]->wait(30s), 3);
    expect_no_waiting(node);
  }
}

TEST_F(NodesMissed, AnInterruptionEndsTheWaiting) {
  start_node(1, 1, {"sh", "-c", "exit 3"});
  ASSERT_TRUE(launches[0]->wait_for_error("looks for rank 0 for up to 10 s"));
  launches[0]->signal(SIGTERM);
  EXPECT_EQ(launches[0]->wait(30s), 3);
  EXPECT_THAT(text(0), HasSubstr("found no rank 0"));
  start_node(1, 1, {"sh", "-c", "echo ready; exec sleep 100"});
  ASSERT_TRUE(launches[1]->wait_for_output("ready"));
  launches[1]->signal(SIGTERM);  // somebody does not want it any more
  EXPECT_EQ(launches[1]->wait(30s), 128 + SIGTERM);
  EXPECT_THAT(text(1), Not(HasSubstr("looks for rank 0")));
}

TEST_F(Nodes, ANodeThatDoesNotComeIsNamed) {
  Process launch(nodes->on(0, join(dualpipe_run(0), {SOCKET_RANK, "endless"})));
  EXPECT_EQ(launch.wait(30s), 1);
  EXPECT_THAT(launch.err(), AllOf(ContainsRegex("\\[0\\] [^\n]*no sign of rank 2, 3 within 4000 ms"),
                                  ContainsRegex("\\[1\\] [^\n]*no sign of rank 2, 3 within 4000 ms")));
}

}  // namespace
}  // namespace dualpipe
