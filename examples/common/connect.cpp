#include "connect.hpp"

#include <unistd.h>

#include <filesystem>
#include <system_error>
#include <utility>

#include "dualpipe/comm/nccl.hpp"
#include "dualpipe/comm/socket.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/testing/communicators.hpp"

namespace example {

std::shared_ptr<dualpipe::Communicator> connect(const dualpipe::World& world, const Options& options) {
  const bool slower = options.latency.count() > 0 || options.bytes_per_second > 0;
  if (options.device == at::kCUDA) {
    DUALPIPE_CHECK(!slower,
                   "--link-latency-ms and --link-bandwidth are for CPU ranks: leave them out, or --device cuda");
    try {
      return dualpipe::connect_nccl(world);
    } catch (const dualpipe::InvalidArgument& error) {
      throw dualpipe::InvalidArgument(dualpipe::detail::str("--device cuda: ", error.what()));
    }
  }
  auto sockets = dualpipe::connect_sockets(world);
  if (!slower) return sockets;
  return dualpipe::testing::delayed_links(std::move(sockets), {options.latency, options.bytes_per_second});
}

void become_gpu_program([[maybe_unused]] const Options& options, [[maybe_unused]] const char* const* argv) {
#if !defined(DUALPIPE_WITH_NCCL)
  if (options.device != at::kCUDA) return;
  std::error_code error;
  std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", error);
  program += "-cuda";
  if (!error) ::execv(program.c_str(), const_cast<char* const*>(argv));  // returns only if there is no such file
#endif
}

}  // namespace example
