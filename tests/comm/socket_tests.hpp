#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <exception>
#include <functional>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <utility>
#include <vector>

#include "dualpipe/comm/socket.hpp"
#include "launch/process.hpp"

/// What the tests of ranks with sockets have in common.
namespace dualpipe::testing {

using StorePtr = c10::intrusive_ptr<c10d::Store>;

inline World world_of(int rank, int size) {
  World world;
  world.rank = world.local_rank = rank;
  world.size = world.local_size = size;
  return world;
}

inline World world_at(int port, int rank, int size) {
  World world = world_of(rank, size);
  world.master_port = port;
  world.run_id = detail::str("tests of process ", ::getpid());  // another one may be given the port as well
  return world;
}

/// Runs `body` as each rank on a thread of its own and returns the errors by rank, empty where there was none.
inline std::vector<std::string> errors_of(int num_ranks, const std::function<void(int rank)>& body) {
  std::vector<std::string> errors(num_ranks);
  std::vector<std::jthread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        body(rank);
      } catch (const std::exception& error) {
        errors[rank] = error.what();
      }
    });
  }
  threads.clear();
  return errors;
}

inline int free_port() {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  socklen_t size = sizeof address;
  ::bind(fd, reinterpret_cast<const sockaddr*>(&address), size);
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  ::close(fd);
  return ntohs(address.sin_port);
}

inline ConnectOptions options_with(StorePtr store,
                                   std::chrono::milliseconds timeout = std::chrono::milliseconds(60'000)) {
  ConnectOptions options;
  options.timeout = timeout;
  options.store = std::move(store);
  return options;
}

/// `mode` of socket_rank.cpp on `ranks` processes.
inline std::vector<std::string> run(int ranks, const std::string& mode, const std::vector<std::string>& flags = {}) {
  std::vector<std::string> command = {DUALPIPE_RUN, "-q", "-n", std::to_string(ranks)};
  command.insert(command.end(), flags.begin(), flags.end());
  command.insert(command.end(), {"--", SOCKET_RANK, mode});
  return command;
}

inline std::size_t count(const std::string& text, const std::string& what) {
  std::size_t found = 0;
  for (std::size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++found;
  return found;
}

}  // namespace dualpipe::testing
