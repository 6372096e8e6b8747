#pragma once

#include <sys/types.h>

#include <csignal>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace dualpipe::run {

/// Owns a file descriptor.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept;
  ~Descriptor() { reset(); }
  int get() const { return fd_; }
  int release();
  void reset();

 private:
  int fd_ = -1;
};

struct Pipe {
  Descriptor read, write;
  Pipe();  ///< closed on exec. @throws std::system_error
};

/// A process that outlives the launcher only to end what the launcher started, should the launcher be killed: the
/// ranks' process groups, which hold also what the ranks themselves started, and the private folder.
class Guard {
 public:
  Guard();   ///< @throws std::exception  no folder or no process; neither is left behind.
  ~Guard();  ///< the ranks have ended in order
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;
  /// A process that is to be guarded writes its own id here, before anything else.
  int descriptor() const { return pipe_.write.get(); }
  /// A folder of this launch that only this user can enter. It is removed with all that is in it.
  const std::filesystem::path& folder() const { return folder_; }

 private:
  std::filesystem::path folder_;
  Descriptor lock_;  ///< keeps cleaners of /tmp, as systemd-tmpfiles, away from the folder
  Pipe pipe_;
  pid_t pid_ = -1;
};

struct Command {
  std::vector<std::string> arguments;       ///< the program first; looked for in PATH
  std::vector<std::string> environment;     ///< "NAME=value"
  int input = -1, output = -1, error = -1;  ///< to become stdin, stdout, stderr; -1: the launcher's own
  std::vector<int> default_signals;         ///< handled here, not to be handled there
};

/// Starts `command` as the leader of a process group of its own that ends with this process. Of open files it inherits
/// stdin, stdout and stderr only.
/// @throws std::system_error  the program cannot be executed; nothing was started.
pid_t spawn(const Command& command, const Guard& guard);

/// How a process ended.
struct Ending {
  bool killed = false;
  int status = 0;  ///< exit code or signal
  bool failed() const { return killed || status != 0; }
  int exit_code() const { return killed ? 128 + status : status; }
  std::string describe() const;
};

/// Empty while it runs. Does not reap: while the leader is a zombie nobody else gets its process group's number.
std::optional<Ending> ending_of(pid_t pid);

/// Whether a child waits for SIGCONT.
bool is_stopped(pid_t pid);

/// Kills what is left of the group that `leader` began, and reaps the leader.
void end_group(pid_t leader);

std::string signal_name(int signal);

}  // namespace dualpipe::run
