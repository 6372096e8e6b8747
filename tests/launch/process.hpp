#pragma once

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "temporary_folder.hpp"

namespace dualpipe::testing {

/// A program under test, with its output in files so that it never waits for a reader. Killed where a test gives up on
/// it.
class Process {
 public:
  /// `changes` are set in its environment; those with an empty value are removed from it.
  explicit Process(std::vector<std::string> command,
                   const std::vector<std::pair<std::string, std::string>>& changes = {}) {
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&files, STDOUT_FILENO, (folder_ / "out").c_str(), O_WRONLY | O_CREAT, 0600);
    posix_spawn_file_actions_addopen(&files, STDERR_FILENO, (folder_ / "err").c_str(), O_WRONLY | O_CREAT, 0600);

    std::vector<std::string> environment;
    for (char** variable = environ; *variable != nullptr; ++variable) {
      const std::string text = *variable;
      bool changed = false;
      for (const auto& [name, value] : changes) changed = changed || text.starts_with(name + "=");
      if (!changed) environment.push_back(text);
    }
    for (const auto& [name, value] : changes) {
      if (!value.empty()) environment.push_back(name + "=" + value);
    }
    const int error = ::posix_spawnp(&pid_, command.front().c_str(), &files, nullptr, pointers(command).data(),
                                     pointers(environment).data());
    posix_spawn_file_actions_destroy(&files);
    if (error != 0) throw std::runtime_error("cannot run " + command.front());
  }
  ~Process() {
    if (!ended_) {
      ::kill(pid_, SIGTERM);  // a launcher ends its ranks
      if (wait(std::chrono::seconds(10)) == kTimedOut) {
        ::kill(pid_, SIGKILL);
        ::waitpid(pid_, nullptr, 0);
      }
    }
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  static constexpr int kTimedOut = -1;

  pid_t pid() const { return pid_; }
  void signal(int number) const { ::kill(pid_, number); }
  /// Its exit code, 128 + signal when it was killed, kTimedOut when it did not end.
  int wait(std::chrono::milliseconds timeout = std::chrono::seconds(60)) {
    const auto deadline = std::chrono::steady_clock::now() + timeout;
    while (!ended_) {
      int status = 0;
      if (::waitpid(pid_, &status, WNOHANG) == pid_) {
        ended_ = true;
        code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      } else if (std::chrono::steady_clock::now() > deadline) {
        return kTimedOut;
      } else {
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
    }
    return code_;
  }
  std::string out() const { return read("out"); }
  std::string err() const { return read("err"); }
  /// Whether `text` came on stdout in time.
  bool wait_for_output(const std::string& text, std::chrono::milliseconds timeout = std::chrono::seconds(60)) const {
    return wait_for("out", text, timeout);
  }
  /// Whether `text` came on stderr in time.
  bool wait_for_error(const std::string& text, std::chrono::milliseconds timeout = std::chrono::seconds(60)) const {
    return wait_for("err", text, timeout);
  }

 private:
  static std::vector<char*> pointers(std::vector<std::string>& texts) {
    std::vector<char*> result;
    for (std::string& text : texts) result.push_back(text.data());
    result.push_back(nullptr);
    return result;
  }
  bool wait_for(const char* name, const std::string& text, std::chrono::milliseconds timeout) const {
    const auto deadline = std::chrono::steady_clock::now() + timeout;
    while (read(name).find(text) == std::string::npos) {
      if (std::chrono::steady_clock::now() > deadline) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return true;
  }
  std::string read(const char* name) const {
    std::ifstream in(folder_ / name, std::ios::binary);
    std::ostringstream text;
    text << in.rdbuf();
    return text.str();
  }

  test::TemporaryFolder folder_;
  pid_t pid_ = -1;
  bool ended_ = false;
  int code_ = 0;
};

}  // namespace dualpipe::testing
