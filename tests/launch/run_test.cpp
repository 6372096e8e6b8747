// dualpipe-run as its users see it: commands, output, exit codes, signals.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <fstream>
#include <optional>
#include <set>
#include <string>

#include "process.hpp"
#include "shell.hpp"

namespace dualpipe {
namespace {

using namespace std::chrono_literals;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::launcher;
using testing::Process;
using testing::shell;
using testing::sorted_lines;

/// As in /proc: R, S, T, Z and others; a space if there is no such process.
char state_of(const std::string& pid) {
  std::ifstream in("/proc/" + pid + "/stat");
  std::string text;
  std::getline(in, text);
  const std::size_t name_end = text.rfind(')');
  return name_end == std::string::npos ? ' ' : text.at(name_end + 2);
}

/// Whether a process runs; a zombie that its new parent has not noticed does not.
bool exists(const std::string& pid) { return state_of(pid) != ' ' && state_of(pid) != 'Z'; }

/// The words that ranks printed after "pid".
std::vector<std::string> pids(const std::string& out) {
  std::vector<std::string> result;
  for (const std::string& line : sorted_lines(out)) {
    if (const std::size_t at = line.find("pid "); at != std::string::npos) result.push_back(line.substr(at + 4));
  }
  return result;
}

void expect_gone(const std::vector<std::string>& processes) {
  const auto deadline = std::chrono::steady_clock::now() + 20s;
  for (const std::string& pid : processes) {
    while (exists(pid) && std::chrono::steady_clock::now() < deadline) std::this_thread::sleep_for(10ms);
    EXPECT_FALSE(exists(pid)) << "process " << pid << " outlived the launcher";
  }
}

TEST(Run, TellsEachRankWhoItIs) {
  Process run(shell(3, "echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR"),
              {{"RANK", "7"}, {"WORLD_SIZE", "9"}});
  EXPECT_EQ(run.wait(), 0);
  EXPECT_THAT(sorted_lines(run.out()),
              ElementsAre("[0] 0/3 0/3 127.0.0.1", "[1] 1/3 1/3 127.0.0.1", "[2] 2/3 2/3 127.0.0.1"));
}

TEST(Run, GivesAllRanksOnePortAndOneRunId) {
  const std::string script = "echo $MASTER_PORT $DUALPIPE_RUN_ID";
  Process first(shell(3, script, {"--label", ""}));
  Process second(shell(1, script, {"--label", ""}));
  ASSERT_EQ(first.wait(), 0);
  ASSERT_EQ(second.wait(), 0);
  const auto lines = sorted_lines(first.out());
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(std::set(lines.begin(), lines.end()).size(), 1u) << first.out();
  const int port = std::stoi(lines.front());
  EXPECT_GE(port, 1024);
  EXPECT_LE(port, 65535);
  EXPECT_GT(lines.front().size(), std::to_string(port).size() + 1) << "a run id is missing";
  EXPECT_NE(first.out().substr(0, lines.front().size()), second.out().substr(0, lines.front().size()));
}

TEST(Run, LimitsThreadsUnlessTheUserHas) {
  Process unset(shell(2, "echo $OMP_NUM_THREADS"), {{"OMP_NUM_THREADS", ""}});
  EXPECT_EQ(unset.wait(), 0);
  EXPECT_THAT(sorted_lines(unset.out()), ElementsAre("[0] 1", "[1] 1"));
  EXPECT_EQ(sorted_lines(unset.err()).size(), 1u) << unset.err();
  EXPECT_THAT(unset.err(), HasSubstr("OMP_NUM_THREADS"));
  Process set(shell(2, "echo $OMP_NUM_THREADS"), {{"OMP_NUM_THREADS", "5"}});
  EXPECT_EQ(set.wait(), 0);
  EXPECT_THAT(sorted_lines(set.out()), ElementsAre("[0] 5", "[1] 5"));
  EXPECT_EQ(set.err(), "");
}

TEST(Run, HidesAnotherLaunchersVariables) {
  Process run(shell(1, "echo store=$TORCHELASTIC_USE_AGENT_STORE"), {{"TORCHELASTIC_USE_AGENT_STORE", "True"}});
  EXPECT_EQ(run.wait(), 0);
  EXPECT_EQ(run.out(), "[0] store=\n");
}

TEST(Run, LabelsOutputAndKeepsTheStreamsApart) {
  Process run(shell(2, "echo to out; echo to err >&2; printf unfinished", {"-q"}));
  EXPECT_EQ(run.wait(), 0);
  EXPECT_THAT(sorted_lines(run.out()), ElementsAre("[0] to out", "[0] unfinished", "[1] to out", "[1] unfinished"));
  EXPECT_THAT(sorted_lines(run.err()), ElementsAre("[0] to err", "[1] to err"));
}

TEST(Run, TakesALabelOrNone) {
  Process labelled(shell(2, "echo x", {"--label", "rank %r: "}));
  EXPECT_EQ(labelled.wait(), 0);
  EXPECT_THAT(sorted_lines(labelled.out()), ElementsAre("rank 0: x", "rank 1: x"));
  Process plain(shell(2, "echo x", {"--no-prefix"}));
  EXPECT_EQ(plain.wait(), 0);
  EXPECT_EQ(plain.out(), "x\nx\n");
}

TEST(Run, LosesNothingOfALongOutput) {
  Process run(shell(2, "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done"));
  EXPECT_EQ(run.wait(), 0);
  const auto lines = sorted_lines(run.out());
  ASSERT_EQ(lines.size(), 40000u);
  EXPECT_EQ(std::set(lines.begin(), lines.end()).size(), 40000u);
}

TEST(Run, ReturnsTheFirstFailingRanksCode) {
  Process run(shell(3, "[ $RANK = 1 ] && exit 7; sleep 0.5; exit 4"));
  EXPECT_EQ(run.wait(), 7);
  EXPECT_THAT(run.err(), HasSubstr("rank 1 failed first: exit code 7"));
}

TEST(Run, LetsOtherRanksEndByThemselvesFirst) {
  Process run(shell(2, "[ $RANK = 1 ] && exit 7; sleep 1; echo my own words"));
  EXPECT_EQ(run.wait(), 7);
  EXPECT_THAT(run.out(), HasSubstr("[0] my own words"));
}

TEST(Run, EndsTheOthersAndWhatTheyStarted) {
  Process run(shell(3, "echo pid $$; [ $RANK = 2 ] && kill -9 $$; sleep 1000 & echo pid $!; wait"));
  EXPECT_EQ(run.wait(), 128 + SIGKILL);
  EXPECT_THAT(run.err(), HasSubstr("rank 2 failed first: killed by SIGKILL (signal 9)"));
  ASSERT_EQ(pids(run.out()).size(), 5u) << run.out();
  expect_gone(pids(run.out()));
}

TEST(Run, KillsThoseWhoIgnoreThePoliteWay) {
  Process run(
      shell(2, "[ $RANK = 1 ] && exit 5; trap '' TERM; echo pid $$; while :; do sleep 0.1; done", {"--grace", "0.2"}));
  EXPECT_EQ(run.wait(), 5);
  expect_gone(pids(run.out()));
}

TEST(Run, DoesNotWaitForWhatARankLeftBehind) {
  Process run(shell(2, "sleep 1000 & echo pid $!"));
  EXPECT_EQ(run.wait(), 0);
  ASSERT_EQ(pids(run.out()).size(), 2u);
  expect_gone(pids(run.out()));
}

TEST(Run, ForwardsSignals) {
  Process run(
      shell(2, "trap 'echo checkpoint' USR1; trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.02; done"));
  ASSERT_TRUE(run.wait_for_output("[0] ready"));
  ASSERT_TRUE(run.wait_for_output("[1] ready"));
  run.signal(SIGUSR1);
  EXPECT_TRUE(run.wait_for_output("[0] checkpoint"));
  EXPECT_TRUE(run.wait_for_output("[1] checkpoint"));
  run.signal(SIGTERM);
  EXPECT_EQ(run.wait(), 0) << "the ranks ended in order";
  EXPECT_THAT(run.out(), AllOf(HasSubstr("[0] bye"), HasSubstr("[1] bye")));
}

TEST(Run, IsSuspendedWithItsRanks) {
  Process suspended(shell(2, "echo pid $$; exec sleep 1000"));  // a shell that starts a child would not stop with it
  while (pids(suspended.out()).size() < 2) std::this_thread::sleep_for(5ms);
  std::vector<std::string> all = pids(suspended.out());
  all.push_back(std::to_string(suspended.pid()));
  suspended.signal(SIGTSTP);
  for (const std::string& pid : all)
    while (state_of(pid) != 'T') std::this_thread::sleep_for(5ms);
  suspended.signal(SIGCONT);
  for (const std::string& pid : all)
    while (state_of(pid) == 'T') std::this_thread::sleep_for(5ms);
  suspended.signal(SIGTERM);
  EXPECT_EQ(suspended.wait(), 128 + SIGTERM);
}

TEST(Run, TellsRanksWhoHasFailed) {
  Process run(shell(3,
                    "[ $RANK = 1 ] && kill -9 $$; while [ ! -e $DUALPIPE_FAILED_FILE ]; do sleep 0.02; done; "
                    "cat $DUALPIPE_FAILED_FILE"));
  EXPECT_EQ(run.wait(), 128 + SIGKILL);
  for (const std::string rank : {"[0] ", "[2] "})
    EXPECT_THAT(run.out(), HasSubstr(rank + "{\"message\":{\"extraInfo\":{\"timestamp\":"));
  for (const std::string part : {"\"message\":\"rank 1: killed by SIGKILL (signal 9)\"", "\"origin\":1", "\"rank\":1"})
    EXPECT_THAT(run.out(), HasSubstr(part));
}

TEST(Run, ReportsAnInterruption) {
  Process run(shell(2, "echo ready; exec sleep 1000"));
  ASSERT_TRUE(run.wait_for_output("[0] ready"));
  ASSERT_TRUE(run.wait_for_output("[1] ready"));
  run.signal(SIGINT);
  EXPECT_EQ(run.wait(), 128 + SIGINT);
  EXPECT_THAT(run.err(), HasSubstr("ended by SIGINT"));
}

TEST(Run, LeavesNoProcessWhenItIsKilledItself) {
  Process run(shell(2, "trap '' HUP TERM; sleep 1000 & echo pid $!; echo pid $$; wait; sleep 1000"));
  ASSERT_TRUE(run.wait_for_output("[0] pid"));
  while (pids(run.out()).size() < 4) std::this_thread::sleep_for(5ms);
  const auto processes = pids(run.out());
  run.signal(SIGKILL);
  EXPECT_EQ(run.wait(), 128 + SIGKILL);
  expect_gone(processes);
}

TEST(Run, EndsWithItsReader) {
  Process pipeline({"/bin/sh", "-c", std::string(DUALPIPE_RUN) + " -n 2 -- yes | head -n 3"});
  EXPECT_EQ(pipeline.wait(), 0);
  EXPECT_EQ(sorted_lines(pipeline.out()).size(), 3u);
}

enum class Target { pipe, terminal };

/// A launch whose stdout is read only when the test says so.
class PausedReader {
 public:
  /// `ranks` may wait for the file $go.
  explicit PausedReader(const std::string& ranks, Target target = Target::pipe) {
    std::string path = folder_ / "fifo";
    if (target == Target::pipe) {
      EXPECT_EQ(::mkfifo(path.c_str(), 0600), 0);
      reader_ = ::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    } else {
      reader_ = ::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
      EXPECT_EQ(::grantpt(reader_) + ::unlockpt(reader_), 0);
      path = ::ptsname(reader_);
    }
    run_.emplace(
        std::vector<std::string>{
            "/bin/sh", "-c", "exec " DUALPIPE_RUN " -q -n 2 --wait-before-term 0.1 -- sh -c '" + ranks + "' > " + path},
        std::vector<std::pair<std::string, std::string>>{{"go", go_}});
  }
  ~PausedReader() { ::close(reader_); }

  Process& run() { return *run_; }
  void go() const { std::ofstream out(go_); }
  /// Until the launcher can write no more, as nothing is added for a while.
  void wait_until_full() const {
    for (int before = 0, bytes = 0; bytes == 0 || bytes != before; std::this_thread::sleep_for(100ms)) {
      before = bytes;
      ::ioctl(reader_, FIONREAD, &bytes);
    }
  }
  std::string read_all() const {
    ::fcntl(reader_, F_SETFL, 0);
    std::string text;
    std::array<char, 1 << 16> buffer;
    for (ssize_t size; (size = ::read(reader_, buffer.data(), buffer.size())) > 0;) text.append(buffer.data(), size);
    return text;
  }

 private:
  test::TemporaryFolder folder_;
  const std::string go_ = folder_ / "go";
  int reader_ = -1;
  std::optional<Process> run_;
};

TEST(Run, NoticesAFailureWhileItsReaderPauses) {
  PausedReader paused(R"([ $RANK = 0 ] && exec yes; while [ ! -e "$go" ]; do sleep 0.02; done; exit 7)");
  paused.wait_until_full();
  paused.go();
  EXPECT_TRUE(paused.run().wait_for_error("rank 1 failed first: exit code 7")) << paused.run().err();
  EXPECT_THAT(paused.read_all(), ::testing::StartsWith("[0] y\n[0] y\n"));
  EXPECT_EQ(paused.run().wait(), 7);
}

TEST(Run, NoticesAFailureWhileItsTerminalPauses) {
  PausedReader paused(R"([ $RANK = 0 ] && exec yes; while [ ! -e "$go" ]; do sleep 0.02; done; exit 7)",
                      Target::terminal);
  paused.wait_until_full();
  paused.go();
  EXPECT_TRUE(paused.run().wait_for_error("rank 1 failed first: exit code 7")) << paused.run().err();
  paused.run().signal(SIGTERM);
  EXPECT_EQ(paused.run().wait(), 7);
}

TEST(Run, CanBeEndedWhileItsReaderPauses) {
  PausedReader paused("echo pid $$ >&2; exec yes");
  paused.wait_until_full();
  while (pids(paused.run().err()).size() < 2) std::this_thread::sleep_for(5ms);
  paused.run().signal(SIGTERM);
  EXPECT_EQ(paused.run().wait(), 128 + SIGTERM);
  expect_gone(pids(paused.run().err()));
}

TEST(Run, AReaderThatPausesLosesNothing) {
  PausedReader paused("i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done");
  paused.wait_until_full();
  const auto lines = sorted_lines(paused.read_all());
  EXPECT_EQ(paused.run().wait(), 0);
  ASSERT_EQ(lines.size(), 40000u);
  EXPECT_EQ(std::set(lines.begin(), lines.end()).size(), 40000u);
}

/// All ranks have ended, and their last lines wait for the reader.
class LastLines : public PausedReader {
 public:
  LastLines()
      : PausedReader(
            "trap : USR1 USR2; echo pid $$ >&2; i=0; while [ $i -lt 4000 ]; do echo line $i; i=$((i+1)); done") {
    while (pids(run().err()).size() < 2) std::this_thread::sleep_for(5ms);
    expect_gone(pids(run().err()));
    wait_until_full();
  }
};

TEST(Run, SignalsThatEndNothingLoseNothing) {
  LastLines last;
  for (const int signal : {SIGUSR1, SIGUSR2, SIGTSTP}) last.run().signal(signal);
  while (state_of(std::to_string(last.run().pid())) != 'T') std::this_thread::sleep_for(5ms);
  last.run().signal(SIGCONT);
  const auto lines = sorted_lines(last.read_all());
  EXPECT_EQ(last.run().wait(), 0);
  EXPECT_EQ(lines.size(), 8000u);
}

TEST(Run, OutputThatIsGivenUpIsNoSuccess) {
  LastLines last;
  last.run().signal(SIGINT);
  EXPECT_EQ(last.run().wait(), 128 + SIGINT);
}

/// A signal mask is inherited by programs.
TEST(Run, HearsSignalsThatWereBlocked) {
  const std::string blocked =
      "import os, signal, sys\n"
      "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, signal.SIGTERM])\n"
      "os.execv(sys.argv[1], sys.argv[1:])\n";
  const auto command = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {"python3", "-c", blocked, DUALPIPE_RUN});
    return arguments;
  };
  Process ends(command({"-n", "2", "--", "true"}));
  EXPECT_EQ(ends.wait(), 0);
  Process ended(command({"-n", "2", "--", "sh", "-c", "echo ready; exec sleep 1000"}));
  ASSERT_TRUE(ended.wait_for_output("[0] ready"));
  ASSERT_TRUE(ended.wait_for_output("[1] ready"));
  ended.signal(SIGTERM);
  EXPECT_EQ(ended.wait(), 128 + SIGTERM);
}

TEST(Run, StoppedRanksAreEndedAtOnce) {
  Process run(shell(2, "echo pid $$; kill -STOP $$", {"--grace", "3600"}));
  while (pids(run.out()).size() < 2) std::this_thread::sleep_for(5ms);
  for (const std::string& pid : pids(run.out()))
    while (state_of(pid) != 'T') std::this_thread::sleep_for(5ms);
  run.signal(SIGTERM);
  EXPECT_EQ(run.wait(), 128 + SIGKILL);
  EXPECT_THAT(run.err(), HasSubstr("ended by SIGTERM"));
}

TEST(Run, GivesPipedInputToRankZero) {
  Process run({"/bin/sh", "-c", "echo words | " DUALPIPE_RUN " -n 2 -- cat"});
  EXPECT_EQ(run.wait(), 0);
  EXPECT_EQ(run.out(), "[0] words\n");
}

TEST(Run, SpansNodes) {
  const std::string script =
      "echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $DUALPIPE_RUN_ID";
  const auto node = [&](const std::string& rank, const std::string& id) {
    return shell(2, script, {"--nnodes", "2", "--node-rank", rank, "--rendezvous", "localhost:29511", "--run-id", id});
  };
  Process first(node("0", "a")), second(node("1", "a"));
  EXPECT_EQ(first.wait(), 0);
  EXPECT_EQ(second.wait(), 0);
  EXPECT_THAT(sorted_lines(first.out()), ElementsAre("[0] 0/4 0/2 localhost:29511 a", "[1] 1/4 1/2 localhost:29511 a"));
  EXPECT_THAT(sorted_lines(second.out()),
              ElementsAre("[2] 2/4 0/2 localhost:29511 a", "[3] 3/4 1/2 localhost:29511 a"));
  Process brackets(shell(1, "echo $MASTER_ADDR $MASTER_PORT", {"--rendezvous", "[::1]:29512"}));
  EXPECT_EQ(brackets.wait(), 0);
  EXPECT_EQ(brackets.out(), "[0] ::1 29512\n");
}

TEST(Run, SaysWhenThereIsNoSuchProgram) {
  Process run(launcher({"-n", "3", "--", "./no-such-program"}));
  EXPECT_EQ(run.wait(), 127);
  EXPECT_EQ(run.err(), "dualpipe-run: cannot run './no-such-program': No such file or directory\n");
}

TEST(Run, SaysWhenAFileIsNoProgram) {
  Process run(launcher({"-n", "2", "--", "/etc/passwd"}));
  EXPECT_EQ(run.wait(), 126);
  EXPECT_THAT(run.err(), HasSubstr("'/etc/passwd': Permission denied"));
}

TEST(Run, RefusesWrongUsage) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{}, "--ranks"},
      {{"-n", "0", "--", "true"}, "0 not in range"},
      {{"-n", "two", "--", "true"}, "two"},
      {{"-n", "99999999999999999999", "--", "true"}, "99999999999999999999"},
      {{"-n", "2"}, "name the program"},
      {{"-n", "2", "--"}, "name the program"},
      {{"-n", "2", "--", ""}, "name the program"},
      {{"-n", "2", "--nodes", "2", "--", "true"}, "--nodes"},
      {{"-n", "2", "true", "--", "true"}, "true"},
      {{"-n", "2", "--nnodes", "2", "--", "true"}, "--node-rank and --rendezvous"},
      {{"-n", "2", "--nnodes", "2", "--node-rank", "2", "--rendezvous", "h:1", "--", "true"},
       "nodes count from 0 to 1"},
      {{"-n", "2", "--nnodes", "2", "--node-rank", "1", "--rendezvous", "h", "--", "true"}, "got 'h'"},
      {{"-n", "2", "--nnodes", "2", "--node-rank", "1", "--rendezvous", "h:70000", "--", "true"}, "got 'h:70000'"},
      {{"-n", "2", "--rendezvous", "tcp://h:29500", "--", "true"}, "as in host0:29500"},
      {{"-n", "2", "--rendezvous", "fd00::1:29500", "--", "true"}, "[fd00::1]:29500"},
      {{"-n", "2", "--node-rank", "1", "--", "true"}, "--node-rank: needs --nnodes"},
      {{"-n", "2", "--grace", "nan", "--", "true"}, "--grace: must be from 0 to 86400, got nan"},
      {{"-n", "2", "--wait-before-term", "inf", "--", "true"}, "must be from 0 to 86400, got inf"},
  };
  for (const auto& [arguments, message] : cases) {
    Process run(launcher(arguments));
    EXPECT_EQ(run.wait(), 2) << ::testing::PrintToString(arguments);
    EXPECT_THAT(run.err(), HasSubstr(message));
    EXPECT_EQ(run.out(), "");
  }
}

TEST(Run, HelpsAndKeepsTheProgramsOwnFlags) {
  Process help(launcher({"--help"}));
  EXPECT_EQ(help.wait(), 0);
  EXPECT_THAT(help.out(), AllOf(HasSubstr("--nnodes"), HasSubstr("--rendezvous"), HasSubstr("WORLD_SIZE")));
  Process flags(launcher({"-n", "1", "--", "echo", "-n", "3", "--help", "--", "x"}));
  EXPECT_EQ(flags.wait(), 0);
  EXPECT_EQ(flags.out(), "[0] 3 --help -- x\n");
  Process without_dashes(launcher({"-n", "1", "echo", "--steps", "3"}));
  EXPECT_EQ(without_dashes.wait(), 0);
  EXPECT_EQ(without_dashes.out(), "[0] --steps 3\n");
}

}  // namespace
}  // namespace dualpipe
