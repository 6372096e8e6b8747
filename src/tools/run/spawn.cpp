#include "tools/run/spawn.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>

#include "tools/run/private_folder.hpp"

namespace dualpipe::run {
namespace {

[[noreturn]] void throw_errno(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
}

constexpr const char* kNoProcess = "cannot start a process (limits: ulimit -u, the cgroup's pids.max)";
constexpr const char* kNoPipe = "cannot make a pipe (limit: ulimit -n)";

constexpr int kFirstNonStandard = STDERR_FILENO + 1;

/// Descriptors from `first` on are not for the program that is executed next.
void close_on_exec_from(int first) {
  if (::close_range(static_cast<unsigned>(first), ~0U, CLOSE_RANGE_CLOEXEC) == 0) return;
  // A kernel before 5.11.
  constexpr long most = 1 << 20;
  const long end = std::clamp(::sysconf(_SC_OPEN_MAX), 0L, most);
  for (int fd = first; fd < end; ++fd) ::fcntl(fd, F_SETFD, FD_CLOEXEC);
}

/// No signal reaches a handler of ours in a child that shares our pipes.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before_);
  }
  ~BlockedSignals() { restore(); }
  void restore() const { sigprocmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

/// For execvpe; points into `texts`.
std::vector<char*> pointers(const std::vector<std::string>& texts) {
  std::vector<char*> result;
  for (const std::string& text : texts) result.push_back(const_cast<char*>(text.c_str()));
  result.push_back(nullptr);
  return result;
}

bool write_all(int fd, const void* data, std::size_t size) {
  return ::write(fd, data, size) == static_cast<ssize_t>(size);  // less than PIPE_BUF: whole or not at all
}

bool read_all(int fd, void* data, std::size_t size) {
  ssize_t got;
  do got = ::read(fd, data, size);
  while (got < 0 && errno == EINTR);
  return got == static_cast<ssize_t>(size);
}

void wait_for(pid_t pid) {
  while (::waitpid(pid, nullptr, 0) < 0 && errno == EINTR) {
  }
}

/// Those who are being killed may still make files.
void remove_folder_of_dying_ranks(const std::filesystem::path& folder) {
  constexpr int attempts = 200;
  for (int attempt = 0; attempt < attempts && !remove_folder(folder); ++attempt)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
}

/// Collects process ids until the launcher says (by a zero) that all has ended, or is gone.
[[noreturn]] void guard_groups(int fd, const std::filesystem::path& folder) {
  ::setpgid(0, 0);  // out of reach of the terminal's Ctrl-C
  const int nothing = ::open("/dev/null", O_RDWR);
  for (const int standard : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) ::dup2(nothing, standard);
  // Whoever waits for the end of a file that the launcher inherited is not to wait for this process.
  const int pipe = ::dup2(fd, kFirstNonStandard);
  ::closefrom(pipe + 1);
  std::vector<pid_t> groups;
  for (pid_t pid; read_all(pipe, &pid, sizeof pid);) {
    if (pid == 0) ::_exit(0);
    groups.push_back(pid);
  }
  for (const pid_t group : groups) ::kill(-group, SIGKILL);
  remove_folder_of_dying_ranks(folder);
  ::_exit(0);
}

}  // namespace

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  if (this != &other) {
    reset();
    fd_ = other.release();
  }
  return *this;
}

int Descriptor::release() { return std::exchange(fd_, -1); }

void Descriptor::reset() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

Pipe::Pipe() {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) throw_errno(errno, kNoPipe);
  read = Descriptor(ends[0]);
  write = Descriptor(ends[1]);
}

Guard::Guard() {
  const BlockedSignals blocked;  // a folder without a guard would stay
  folder_ = make_private_folder();
  lock_ = Descriptor(::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (lock_.get() >= 0) ::flock(lock_.get(), LOCK_SH | LOCK_NB);
  pid_ = ::fork();
  if (pid_ < 0) {
    const int error = errno;
    remove_folder(folder_);
    throw_errno(error, kNoProcess);
  }
  if (pid_ == 0) {
    pipe_.write.reset();
    guard_groups(pipe_.read.get(), folder_);
  }
  pipe_.read.reset();
}

Guard::~Guard() {
  remove_folder_of_dying_ranks(folder_);
  const pid_t over = 0;
  write_all(pipe_.write.get(), &over, sizeof over);
  wait_for(pid_);
}

pid_t spawn(const Command& command, const Guard& guard) {
  // All memory is had before the fork.
  const std::vector<char*> arguments = pointers(command.arguments);
  const std::vector<char*> environment = pointers(command.environment);
  const pid_t launcher = ::getpid();
  Pipe report;  // closes on exec, or carries the reason why there was none

  const BlockedSignals blocked;
  const pid_t pid = ::fork();
  if (pid < 0) throw_errno(errno, kNoProcess);
  if (pid == 0) {
    ::setpgid(0, 0);
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    const pid_t self = ::getpid();
    if (::getppid() != launcher || !write_all(guard.descriptor(), &self, sizeof self)) ::_exit(127);
    for (const int signal : command.default_signals) ::signal(signal, SIG_DFL);
    blocked.restore();
    if (command.input >= 0) ::dup2(command.input, STDIN_FILENO);
    if (command.output >= 0) ::dup2(command.output, STDOUT_FILENO);
    if (command.error >= 0) ::dup2(command.error, STDERR_FILENO);
    close_on_exec_from(kFirstNonStandard);
    ::execvpe(arguments.front(), arguments.data(), environment.data());
    const int reason = errno;
    write_all(report.write.get(), &reason, sizeof reason);
    ::_exit(127);
  }
  ::setpgid(pid, pid);  // whoever comes first, so that the group exists from here on
  report.write.reset();
  int reason = 0;
  if (read_all(report.read.get(), &reason, sizeof reason)) {
    wait_for(pid);
    throw_errno(reason, "cannot run '" + command.arguments.front() + "'");
  }
  return pid;
}

std::string Ending::describe() const {
  return killed ? "killed by " + signal_name(status) + " (signal " + std::to_string(status) + ")"
                : "exit code " + std::to_string(status);
}

std::optional<Ending> ending_of(pid_t pid) {
  siginfo_t info{};
  if (::waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid == 0)
    return std::nullopt;
  return Ending{info.si_code != CLD_EXITED, info.si_status};
}

bool is_stopped(pid_t pid) {
  siginfo_t info{};
  return ::waitid(P_PID, static_cast<id_t>(pid), &info, WSTOPPED | WNOHANG | WNOWAIT) == 0 && info.si_pid != 0;
}

void end_group(pid_t leader) {
  ::kill(-leader, SIGKILL);
  wait_for(leader);
}

std::string signal_name(int signal) {
  const char* name = ::sigabbrev_np(signal);
  return name ? std::string("SIG") + name : "signal " + std::to_string(signal);
}

}  // namespace dualpipe::run
