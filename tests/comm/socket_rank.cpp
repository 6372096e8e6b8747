// One rank of the tests that need real processes; see socket_test.cpp for what is expected of each mode. Started by a
// launcher.
#include <ATen/ATen.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <string>
#include <thread>

#include "dualpipe/comm/socket.hpp"
#include "dualpipe/launch/failure.hpp"
#include "dualpipe/launch/world.hpp"

namespace dualpipe {
namespace {

using namespace std::chrono_literals;
using Ptr = std::shared_ptr<Communicator>;

constexpr std::int64_t large = 3 << 20;  // elements; 12 MiB

void require(bool condition, const std::string& what) {
  if (!condition) throw Error("unexpected: " + what);
}

/// A number that only this sender, receiver and round have.
double mark(int from, int to, int round) { return from * 1e6 + to * 1e3 + round; }

/// Everybody to everybody, small and large at once.
void exchange(const Ptr& comm, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    std::vector<Pending> sends, receives;
    for (int peer = 0; peer < comm->size(); ++peer) {
      if (peer == comm->rank()) continue;
      const double sent = mark(comm->rank(), peer, round);
      sends.push_back(
          comm->send(peer, {at::full({3}, sent, at::kDouble), at::full({round == 0 ? large : 5}, sent, at::kFloat)}));
    }
    for (int peer = 0; peer < comm->size(); ++peer) {
      if (peer == comm->rank()) continue;
      const Tensors got = comm->receive(peer).take();
      const double expected = mark(peer, comm->rank(), round);
      require(at::all(got.at(0) == expected).item<bool>(), "the small tensor");
      require(at::all(got.at(1) == static_cast<float>(expected)).item<bool>(), "the large tensor");
    }
    for (Pending& send : sends) send.wait();
  }
  const auto sum = comm->all_reduce({at::full({7}, comm->rank() + 1.0, at::kDouble)}).take();
  require(at::all(sum.at(0) == comm->size() * (comm->size() + 1) / 2.0).item<bool>(), "the sum");
  comm->barrier().wait();
}

/// @param name  of the communicator.
void meets(const World& world, const std::string& name, bool encryption) {
  connect_sockets(world, {.name = name, .timeout = 60s, .encryption = encryption});
  std::cout << "connected" << std::endl;
}

void transfers(const World& world) {
  exchange(connect_sockets(world, {.timeout = 60s}), 20);
  std::cout << "fine" << std::endl;
}

/// Rank 1 raises `signal` in the middle, unless that is 0; the others print what they learn.
void struck(const World& world, int signal, std::chrono::milliseconds timeout) {
  const auto comm = connect_sockets(world, {.timeout = timeout});
  exchange(comm, 2);
  std::cout << "exchanging" << std::endl;
  try {
    for (int round = 0;; ++round) {
      if (world.rank == 1 && round == 20) std::raise(signal);
      exchange(comm, 1);
    }
  } catch (const CommError& error) {
    std::cout << "origin " << error.origin_rank() << " message " << error.what() << std::endl;
    throw;
  }
}

/// Rank 1 is killed, and leaves a program behind that it has started.
void survived_by_a_child(const World& world) {
  const auto comm = connect_sockets(world, {.timeout = 60s});
  exchange(comm, 2);
  if (world.rank == 1) {
    require(std::system("sleep 4 </dev/null >/dev/null 2>&1 &") == 0, "no shell");
    std::raise(SIGKILL);
  }
  try {
    comm->barrier().wait();
  } catch (const CommError& error) {
    std::cout << "origin " << error.origin_rank() << " message " << error.what() << std::endl;
  }
}

/// Steps as fast as they come. After a while a thread of rank 1 raises `signal`; the others print how many steps are over.
void steps(const World& world, int signal, std::chrono::microseconds after) {
  const auto comm = connect_sockets(world, {.timeout = 60s, .liveness = 3s});
  comm->barrier().wait();
  std::jthread striker([&] {
    if (world.rank != 1) return;
    std::this_thread::sleep_for(after);
    std::raise(signal);
  });
  int over = 0;
  try {
    for (;; ++over) comm->commit(std::to_string(world.rank));
  } catch (const CommError& error) {
    std::cout << "over " << over << " origin " << error.origin_rank() << " message " << error.what() << std::endl;
    throw;
  }
}

/// Odd ranks end without having connected; the others come one after the other.
void missing(const World& world) {
  if (world.rank % 2 == 1) return;
  std::this_thread::sleep_for(world.rank * 200ms);
  try {
    connect_sockets(world, {.timeout = 5s});
    std::cout << "connected" << std::endl;
  } catch (const CommError& error) {
    std::cout << "origin " << error.origin_rank() << " message " << error.what() << std::endl;
  }
}

/// Rank `struck` raises `signal` in the meeting, while all wait for the last rank, which does not come in time.
///
/// @param folder  where ranks leave a file when they are about to come.
void struck_in_meeting(const World& world, int signal, int struck, const std::filesystem::path& folder) {
  if (world.rank == world.size - 1) std::this_thread::sleep_for(60s);
  std::ofstream(folder / std::to_string(world.rank)).close();
  std::jthread striker([&] {
    if (world.rank != struck) return;
    for (int rank = 0; rank < world.size - 1; ++rank)
      while (!std::filesystem::exists(folder / std::to_string(rank))) std::this_thread::sleep_for(5ms);
    std::this_thread::sleep_for(1s);
    std::raise(signal);
  });
  try {
    connect_sockets(world, {.timeout = 60s, .liveness = 3s});
    std::cout << "connected" << std::endl;
  } catch (const CommError& error) {
    std::cout << "origin " << error.origin_rank() << " message " << error.what() << std::endl;
    throw;
  }
}

/// All ranks are stopped for longer than their liveness and the timeout of what they wait in, at about the same time.
void suspended(const World& world) {
  const auto comm = connect_sockets(world, {.timeout = 5s, .liveness = 2s});
  exchange(comm, 2);
  const std::string pid = std::to_string(::getpid());
  const std::string command = "(sleep 1; kill -STOP " + pid + "; sleep 7; kill -CONT " + pid + ") </dev/null &";
  require(std::system(command.c_str()) == 0, "no shell");
  const auto end = std::chrono::steady_clock::now() + 9s;
  // All go on until the last has had enough.
  for (bool over = false; !over;) {
    const double more = std::chrono::steady_clock::now() < end ? 1 : 0;
    over = comm->all_reduce({at::full({1}, more, at::kDouble)}).take().at(0).item<double>() == 0;
    comm->commit("");
  }
  std::cout << "fine" << std::endl;
}

void two_names(const World& world) {
  const auto first = connect_sockets(world, {.name = "first", .timeout = 60s});
  const auto second = connect_sockets(world, {.name = "second", .timeout = 60s});
  exchange(second, 2);
  exchange(first, 2);
  second->abort("only the second");
  bool failed = false;
  try {
    second->barrier().wait();
  } catch (const CommError&) {
    failed = true;
  }
  require(failed, "the aborted one goes on");
  exchange(first, 2);
  std::cout << "fine" << std::endl;
}

void reconnect(const World& world) {
  for (int epoch = 0; epoch < 4; ++epoch) {
    const auto comm = connect_sockets(world, {.epoch = epoch, .timeout = 60s});
    try {
      exchange(comm, 2);
      if (world.rank == epoch % world.size) comm->abort(detail::str("failure ", epoch));
      comm->barrier().wait();
      throw Error("the barrier was passed");
    } catch (const CommError& error) {
      require(error.origin_rank() == epoch % world.size,
              detail::str("origin ", error.origin_rank(), " in epoch ", epoch, ": ", error.what()));
      require(std::string(error.what()).find(detail::str("failure ", epoch)) != std::string::npos, error.what());
    }
  }
  std::cout << "fine" << std::endl;
}

/// A rank that ends by an exception, and its communicator with it.
void throws(const World& world) {
  const auto comm = connect_sockets(world, {.timeout = 60s});
  if (world.rank == 1) {
    comm->abort("the loss is not a number");
    throw Error("the loss is not a number");
  }
  try {
    exchange(comm, 1);
    comm->barrier().wait();
  } catch (const CommError& error) {
    std::cout << "origin " << error.origin_rank() << " message " << error.what() << std::endl;
    throw;
  }
}

/// Measures processor time and latency of a small message.
void ping_pong(const World& world) {
  const auto comm = connect_sockets(world, {.timeout = 60s});
  const int peer = 1 - world.rank;
  constexpr int rounds = 20'000;
  const at::Tensor tensor = at::zeros({16, 16});
  comm->barrier().wait();
  const auto cpu = std::clock();
  const auto begin = std::chrono::steady_clock::now();
  for (int round = 0; round < rounds; ++round) {
    if (world.rank == 0) comm->send(peer, {tensor}).wait();
    const Tensors got = comm->receive(peer).take();
    if (world.rank == 1) comm->send(peer, {tensor}).wait();
  }
  const double used = static_cast<double>(std::clock() - cpu) / CLOCKS_PER_SEC / (2 * rounds) * 1e6;
  const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - begin;
  const at::Tensor total = comm->all_reduce({at::full({1}, used, at::kDouble)}).take().at(0);
  if (world.rank == 0) {
    std::cout << "processor time per transfer, both ends: " << total.item<double>() << " us; one way "
              << elapsed.count() / (2 * rounds) << " us" << std::endl;
  }
}

void bandwidth(const World& world) {
  const auto comm = connect_sockets(world, {.timeout = 60s});
  for (const std::int64_t bytes :
       {std::int64_t{1} << 10, std::int64_t{1} << 16, std::int64_t{1} << 20, std::int64_t{1} << 26}) {
    const int rounds = static_cast<int>(std::max<std::int64_t>(10, std::min<std::int64_t>(2000, (1 << 28) / bytes)));
    const at::Tensor tensor = at::zeros({bytes}, at::kByte);
    comm->barrier().wait();
    const auto begin = std::chrono::steady_clock::now();
    for (int round = 0; round < rounds; ++round) {
      if (world.rank == 0) comm->send(1, {tensor}).wait();
      const Tensors got = comm->receive(1 - world.rank).take();
      if (world.rank == 1) comm->send(0, {tensor}).wait();
    }
    const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - begin;
    if (world.rank == 0)
      std::cout << bytes << " bytes: " << elapsed.count() / (2 * rounds) << " us one way" << std::endl;
  }
}

}  // namespace
}  // namespace dualpipe

int main(int argc, char** argv) {
  using namespace dualpipe;
  const std::map<std::string, std::function<void(const World&)>> modes = {
      {"transfers", transfers},
      {"meets", [&](const World& world) { meets(world, argv[2], !world.secret.empty()); }},
      {"killed", [](const World& world) { struck(world, SIGKILL, 60s); }},
      {"stopped", [](const World& world) { struck(world, SIGSTOP, 5s); }},
      {"endless", [](const World& world) { struck(world, 0, 4s); }},
      {"missing", missing},
      {"meeting-killed", [&](const World& world) { struck_in_meeting(world, SIGKILL, std::stoi(argv[2]), argv[3]); }},
      {"meeting-stopped", [&](const World& world) { struck_in_meeting(world, SIGSTOP, std::stoi(argv[2]), argv[3]); }},
      {"suspended", suspended},
      {"two_names", two_names},
      {"reconnect", reconnect},
      {"throws", throws},
      {"ping_pong", ping_pong},
      {"bandwidth", bandwidth},
      {"steps-killed",
       [&](const World& world) { steps(world, SIGKILL, std::chrono::microseconds(std::stoi(argv[2]))); }},
      {"child", survived_by_a_child},
      {"steps-stopped", [](const World& world) { steps(world, SIGSTOP, 20ms); }},
  };
  World world;
  try {
    world = World::from_env();
    const auto mode = modes.find(argc > 1 ? argv[1] : "");
    if (mode == modes.end()) throw InvalidArgument("unknown mode");
    mode->second(world);
    return 0;
  } catch (const std::exception& error) {
    report_failure(world, error);
    return 1;
  }
}
