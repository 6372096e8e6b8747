#include "tools/run/spawn.hpp"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <utility>

namespace dualpipe::run {
namespace {

[[noreturn]] void throw_errno(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
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

/// Collects process ids until the launcher says (by a zero) that all has ended, or is gone.
[[noreturn]] void guard_groups(int fd) {
  ::setpgid(0, 0);  // out of reach of the terminal's Ctrl-C
  const int nothing = ::open("/dev/null", O_RDWR);
  for (const int standard : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) ::dup2(nothing, standard);
  std::vector<pid_t> groups;
  for (pid_t pid; read_all(fd, &pid, sizeof pid);) {
    if (pid == 0) ::_exit(0);
    groups.push_back(pid);
  }
  for (const pid_t group : groups) ::kill(-group, SIGKILL);
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
  if (::pipe2(ends, O_CLOEXEC) != 0) throw_errno(errno, "cannot make a pipe");
  read = Descriptor(ends[0]);
  write = Descriptor(ends[1]);
}

Guard::Guard() {
  const BlockedSignals blocked;
  pid_ = ::fork();
  if (pid_ < 0) throw_errno(errno, "cannot start a process");
  if (pid_ == 0) {
    pipe_.write.reset();
    guard_groups(pipe_.read.get());
  }
  pipe_.read.reset();
}

Guard::~Guard() {
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
  if (pid < 0) throw_errno(errno, "cannot start a process");
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

void end_group(pid_t leader) {
  ::kill(-leader, SIGKILL);
  wait_for(leader);
}

std::string signal_name(int signal) {
  const char* name = ::sigabbrev_np(signal);
  return name ? std::string("SIG") + name : "signal " + std::to_string(signal);
}

}  // namespace dualpipe::run
