// What dualpipe-run opens, makes and inherits: the private folder, the secret, streams, descriptors, processes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "process.hpp"
#include "shell.hpp"

namespace dualpipe {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr bool sanitized = true;
#else
constexpr bool sanitized = false;
#endif

namespace fs = std::filesystem;
using namespace std::chrono_literals;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;
using testing::Process;
using testing::shell;
using testing::sorted_lines;
using ::testing::StartsWith;
using Variables = std::vector<std::pair<std::string, std::string>>;

/// `script`, in which $run stands for the launcher.
Process by_shell(const std::string& script, const Variables& changes = {}) {
  return Process({"/bin/sh", "-c", "run=" DUALPIPE_RUN "; " + script}, changes);
}

class RunResources : public ::testing::Test {
 protected:
  std::size_t files() const { return std::distance(fs::directory_iterator(temporary_.path()), {}); }
  /// Folders are made in `temporary_`.
  Variables here() const { return {{"TMPDIR", temporary_.path().string()}, {"XDG_RUNTIME_DIR", ""}}; }

  dualpipe::test::TemporaryFolder temporary_;
};

// ---- the private folder

TEST_F(RunResources, FolderIsPrivateAndEndsWithTheLaunch) {
  for (const std::string end : {"exit 0", "exit 3", "kill -9 $$"}) {
    Process run(
        shell(1, "cd $(dirname $DUALPIPE_ERROR_FILE); stat -c '%a' .; pwd; mkdir -p deep/er; > deep/er/file; " + end,
              {"--label", "", "-q"}),
        here());
    EXPECT_NE(run.wait(), Process::kTimedOut);
    EXPECT_THAT(run.out(), MatchesRegex("700\n" + temporary_.path().string() + "/dualpipe-run-......\n")) << run.err();
    EXPECT_EQ(files(), 0u) << end;
  }
}

TEST_F(RunResources, FolderIsRemovedWhenTheLauncherIsKilled) {
  Process run(shell(2, "echo ready; while :; do > $(mktemp -p $(dirname $DUALPIPE_ERROR_FILE)); done"), here());
  ASSERT_TRUE(run.wait_for_output("[0] ready"));
  ASSERT_TRUE(run.wait_for_output("[1] ready"));
  EXPECT_EQ(files(), 1u);
  run.signal(SIGKILL);
  EXPECT_EQ(run.wait(), 128 + SIGKILL);
  for (int i = 0; i < 2000 && files() > 0; ++i) std::this_thread::sleep_for(10ms);
  EXPECT_EQ(files(), 0u);
}

TEST_F(RunResources, FolderIsThatOfTheSessionWhereItIsPrivate) {
  const fs::path session = temporary_ / "session";
  fs::create_directory(session);
  const auto parent = [&](fs::perms permissions) {
    fs::permissions(session, permissions);
    Process run(shell(1, "dirname $(dirname $DUALPIPE_ERROR_FILE)", {"--label", ""}),
                {{"TMPDIR", temporary_.path().string()}, {"XDG_RUNTIME_DIR", session.string()}});
    EXPECT_EQ(run.wait(), 0) << run.err();
    return run.out();
  };
  EXPECT_EQ(parent(fs::perms::owner_all), session.string() + "\n");
  EXPECT_EQ(parent(fs::perms::owner_all | fs::perms::others_read), temporary_.path().string() + "\n");
}

TEST_F(RunResources, FolderThatCannotBeMadeIsOneError) {
  Process run(shell(2, "echo ran"), {{"TMPDIR", "/no/such"}, {"XDG_RUNTIME_DIR", ""}});
  EXPECT_EQ(run.wait(), 1);
  EXPECT_EQ(run.out(), "");
  EXPECT_EQ(run.err(),
            "dualpipe-run: cannot make a private folder in /no/such: No such file or directory; set TMPDIR to a folder "
            "in which this user can make files\n");
}

// ---- the secret

TEST_F(RunResources, SecretIsInAPrivateFileAndNowhereElse) {
  const std::string script =
      "stat -c '%a %s' $DUALPIPE_SECRET_FILE; s=$(cat $DUALPIPE_SECRET_FILE); "
      "(env; cat /proc/$PPID/cmdline /proc/$PPID/environ) | tr '\\0' '\\n' | grep -c \"$s\"; echo $s";
  Process first(shell(1, script, {"--label", ""}), here()), second(shell(1, script, {"--label", ""}), here());
  EXPECT_EQ(first.wait(), 0) << first.err();
  EXPECT_EQ(second.wait(), 0);
  EXPECT_THAT(first.out(), MatchesRegex("600 64\n0\n[0-9a-f]+\n"));
  EXPECT_NE(first.out(), second.out());
  EXPECT_EQ(first.err(), "");
}

TEST_F(RunResources, SecretOfTheUserIsUsed) {
  const std::string script = "echo $DUALPIPE_SECRET_FILE";
  Process run(shell(1, script), {{"DUALPIPE_SECRET_FILE", "/my/secret"}});
  EXPECT_EQ(run.wait(), 0);
  EXPECT_EQ(run.out(), "[0] /my/secret\n");
  Process nodes(shell(1, script, {"--nnodes", "2", "--node-rank", "0", "--rendezvous", "localhost:29514"}),
                {{"DUALPIPE_SECRET_FILE", ""}});
  EXPECT_EQ(nodes.wait(), 0);
  EXPECT_EQ(nodes.out(), "[0] \n") << "the other node could not know it";
}

// ---- streams

TEST_F(RunResources, StreamsMayBeClosed) {
  const std::string out = (temporary_ / "out").string();
  // Each rank says which of its streams are open, into a file.
  const std::string rank =
      "'for f in 0 1 2; do [ -e /proc/$$/fd/$f ] && echo open >> " + out + ".$RANK; done; echo x; echo y >&2; cat'";
  for (const std::string flags : {"", "--no-prefix"}) {
    Process run = by_shell("exec $run -n 2 " + flags + " -- sh -c " + rank + " <&- >&- 2>&-");
    EXPECT_EQ(run.wait(), 0);
    for (const std::string name : {".0", ".1"}) {
      std::ifstream in(out + name);
      EXPECT_EQ(std::string(std::istreambuf_iterator<char>(in), {}), "open\nopen\nopen\n") << flags;
      fs::remove(out + name);
    }
  }
  Process failing = by_shell("exec $run -n 2 -- sh -c 'exit 7' <&- >&- 2>&-");
  EXPECT_EQ(failing.wait(), 7);
}

TEST_F(RunResources, OutputThatCannotBeWrittenIsAFailure) {
  const std::string message = "dualpipe-run: standard output cannot be written: No space left on device\n";
  Process short_one = by_shell("exec $run -q -n 2 -- echo x >/dev/full");
  EXPECT_EQ(short_one.wait(), 1);
  EXPECT_EQ(short_one.err(), message);
  Process endless = by_shell("exec $run -q -n 2 -- yes >/dev/full");
  EXPECT_EQ(endless.wait(), 1);
  EXPECT_EQ(endless.err(), message);
  Process failing = by_shell("exec $run -q -n 1 -- sh -c 'echo x; exit 7' >/dev/full");
  EXPECT_THAT(failing.wait(), ::testing::AnyOf(1, 7));
  EXPECT_THAT(failing.err(), HasSubstr(message));
  Process errors = by_shell("exec $run -q -n 2 -- sh -c 'echo x >&2' 2>/dev/full");
  EXPECT_EQ(errors.wait(), 1);
  Process help = by_shell("exec $run --help >/dev/full");
  EXPECT_EQ(help.wait(), 1);
  EXPECT_THAT(help.err(), HasSubstr("standard output cannot be written"));
}

// ---- descriptors and processes

TEST_F(RunResources, RanksInheritTheStandardStreamsOnly) {
  Process run = by_shell("exec $run -q -n 3 --label '' -- sh -c 'ls /proc/$$/fd' 5</dev/null 77</dev/null");
  EXPECT_EQ(run.wait(), 0);
  const std::vector<std::string> expected = {"0", "0", "0", "1", "1", "1", "2", "2", "2"};
  // The shell may hold its script open, not below 10.
  std::vector<std::string> lines = sorted_lines(run.out());
  std::erase_if(lines, [](const std::string& line) { return line == "10"; });
  EXPECT_EQ(lines, expected);
}

TEST_F(RunResources, TooFewDescriptorsAreOneError) {
  if (sanitized) GTEST_SKIP() << "sanitizers need descriptors and threads of their own";
  bool succeeded = false;
  for (int limit = 4; !succeeded && limit < 100; ++limit) {
    SCOPED_TRACE(limit);
    // Those of the program under test, not of the shell.
    Process run(
        {"/bin/sh", "-c", "ulimit -n " + std::to_string(limit) + "; exec " DUALPIPE_RUN " -q -n 4 -- sleep 0.1"},
        here());
    const int exit_code = run.wait();
    succeeded = exit_code == 0;
    if (succeeded) break;
    EXPECT_EQ(files(), 0u);
    EXPECT_EQ(sorted_lines(run.err()).size(), 1u) << run.err();
    if (run.err().find("loading shared libraries") != std::string::npos) continue;
    EXPECT_EQ(exit_code, 1) << run.err();
    EXPECT_THAT(run.err(), AllOf(StartsWith("dualpipe-run: "), HasSubstr("Too many open files")));
  }
  EXPECT_TRUE(succeeded);
}

std::size_t processes_of(uid_t user) {
  std::size_t count = 0;
  for (const fs::directory_entry& entry : fs::directory_iterator("/proc")) {
    struct stat status{};
    const bool is_process = entry.path().filename().string().find_first_not_of("0123456789") == std::string::npos;
    if (is_process && ::stat(entry.path().c_str(), &status) == 0 && status.st_uid == user) ++count;
  }
  return count;
}

/// As many processes as a user may have are counted for all that the user runs.
TEST_F(RunResources, TooFewProcessesAreOneError) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs a user without other processes";
  if (sanitized) GTEST_SKIP() << "sanitizers need descriptors and threads of their own";
  // A user of this process alone: the same test may run twice on a machine.
  const uid_t nobody_else = 1'000'000 + static_cast<uid_t>(::getpid());
  fs::permissions(temporary_.path(), fs::perms::all);
  bool succeeded = false;
  for (int limit = 1; !succeeded && limit < 20; ++limit) {
    SCOPED_TRACE(limit);
    Process run({"setpriv", "--reuid", std::to_string(nobody_else), "--clear-groups", "--inh-caps=-all", "prlimit",
                 "--nproc=" + std::to_string(limit), DUALPIPE_RUN, "-q", "-n", "4", "--", "sleep", "0.1"},
                here());
    const int exit_code = run.wait();
    if (run.err().find("setpriv") != std::string::npos || run.err().find("prlimit") != std::string::npos)
      GTEST_SKIP() << run.err();
    succeeded = exit_code == 0;
    EXPECT_EQ(files(), 0u);
    EXPECT_EQ(processes_of(nobody_else), 0u);
    if (succeeded) break;
    EXPECT_EQ(exit_code, 1);
    EXPECT_EQ(run.err(),
              "dualpipe-run: cannot start a process (limits: ulimit -u, the cgroup's pids.max): "
              "Resource temporarily unavailable\n");
  }
  EXPECT_TRUE(succeeded);
}

}  // namespace
}  // namespace dualpipe
