#pragma once

#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <array>
#include <filesystem>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch/process.hpp"

namespace dualpipe::testing {

/// Two hosts, as far as networks go: two network namespaces with a cable between them. They are called node0 and node1;
/// each takes its own name for a loopback address, as Debian sets up its hosts. They have no names outside of this
/// object and end with their last process, so nothing is left behind whatever happens.
class TwoNodes {
 public:
  /// @throws std::runtime_error  this machine does not let the test make them; the text says why.
  TwoNodes() {
    std::vector<std::string> outside = {"unshare"};
    if (::geteuid() != 0) outside.insert(outside.end(), {"--user", "--map-root-user"});
    hold(0, outside);
    std::vector<std::string> beside = {"unshare"};
    if (::geteuid() != 0)
      beside.insert(beside.begin(), {"nsenter", "--target", pid(0), "--user", "--preserve-credentials"});
    hold(1, beside);
    run(0, "ip link add cable type veth peer name cable netns " + pid(1));
    for (const int node : {0, 1})
      run(node, "ip address add " + address(node) + "/24 dev cable && ip link set cable up");
  }
  TwoNodes(const TwoNodes&) = delete;
  TwoNodes& operator=(const TwoNodes&) = delete;

  static std::string address(int node) { return "10.77.0." + std::to_string(1 + node); }

  /// `command`, to be run on `node`.
  std::vector<std::string> on(int node, const std::vector<std::string>& command) const {
    std::vector<std::string> all = {"nsenter", "--target", pid(node), "--net", "--mount", "--wd"};
    if (::geteuid() != 0) all.insert(all.end(), {"--user", "--preserve-credentials"});
    all.insert(all.end(), command.begin(), command.end());
    return all;
  }

  /// Takes this process, which has one thread, to the network of `node`.
  void enter(int node) const {
    const auto enter_namespace = [&](const std::string& kind) {
      const int fd = ::open(("/proc/" + pid(node) + "/ns/" + kind).c_str(), O_RDONLY | O_CLOEXEC);
      const bool entered = fd >= 0 && ::setns(fd, 0) == 0;
      if (fd >= 0) ::close(fd);
      if (!entered) throw std::runtime_error("cannot enter the " + kind + " namespace of node " + std::to_string(node));
    };
    if (::geteuid() != 0) enter_namespace("user");
    enter_namespace("net");
  }

  /// From now on nothing passes, and nobody is told.
  void cut_cable() const { run(1, "ip link set cable down"); }

  /// A file of /proc/net, as `node` sees it.
  std::string network_file(int node, const std::string& name) const {
    std::ifstream in("/proc/" + pid(node) + "/net/" + name);
    return {std::istreambuf_iterator<char>(in), {}};
  }

 private:
  /// Makes a node out of a process that does nothing, and that ends by itself should the test be killed.
  void hold(int node, std::vector<std::string> unshare) {
    const std::filesystem::path hosts = folder_ / ("hosts" + std::to_string(node));
    std::ofstream(hosts) << "127.0.0.1 localhost\n127.0.1.1 node" << node << "\n"
                         << address(1 - node) << " node" << 1 - node << "\n";
    unshare.insert(
        unshare.end(),
        {"--net", "--mount", "sh", "-c",
         "mount --bind \"$0\" /etc/hosts && ip link set lo up && echo ready && exec sleep 300", hosts.string()});
    auto& process = processes_[static_cast<std::size_t>(node)];
    process = std::make_unique<Process>(unshare);
    while (!process->wait_for_output("ready", std::chrono::milliseconds(10))) {
      if (process->wait(std::chrono::milliseconds(0)) != Process::kTimedOut)
        throw std::runtime_error("no network namespaces here: " + process->err());
    }
  }

  void run(int node, const std::string& script) const {
    Process process(on(node, {"sh", "-c", script}));
    if (process.wait() != 0) throw std::runtime_error("'" + script + "' failed: " + process.err());
  }

  std::string pid(int node) const { return std::to_string(processes_[static_cast<std::size_t>(node)]->pid()); }

  test::TemporaryFolder folder_;
  std::array<std::unique_ptr<Process>, 2> processes_;
};

}  // namespace dualpipe::testing
