// The times of NcclContext's operations.
#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

#include "nccl/context.hpp"

namespace dualpipe::detail {
namespace {

OperationKey key_of(const NcclOperation& operation, int rank) {
  const Request& request = operation.request;
  const Header& header = request.header;
  std::int64_t from = -1, to = -1;
  if (header.channel == Channel::transfer) {
    from = rank;
    to = request.peer;
    if (request.kind != Request::Kind::send) std::swap(from, to);
  }
  return {header.group, operation.first_rank, from, to, static_cast<std::int64_t>(header.sequence)};
}

}  // namespace

void NcclContext::time_operations(bool on) {
  const std::lock_guard lock(launch_mutex_);
  timed_ = on;
  timed_operations_.clear();
}

// The kernels of an operation end at the same time, and that of the last participant has waited for nobody: the operation
// has lasted as long as this one. So no clocks are compared, which differ between hosts.
void NcclContext::share_times(Communicator& ranks) {
  Queue operations;
  {
    const std::lock_guard lock(launch_mutex_);
    operations.swap(timed_operations_);
  }
  std::erase_if(operations, [this](const auto& operation) {
    return !on_device(operation->request, [&](DeviceApi& device) { return device.done(operation->end.get()); });
  });
  constexpr std::int64_t columns = std::tuple_size_v<OperationKey>;
  const auto count = static_cast<std::int64_t>(operations.size());
  const at::Tensor keys = at::empty({count, columns}, at::kLong);
  const at::Tensor seconds = at::empty({count}, at::kDouble);
  std::vector<OperationKey> own;
  for (const auto& operation : operations) {
    const OperationKey& key = own.emplace_back(key_of(*operation, transport().rank()));
    std::copy(key.begin(), key.end(), keys.mutable_data_ptr<std::int64_t>() + (std::ssize(own) - 1) * columns);
    seconds.mutable_data_ptr<double>()[own.size() - 1] = on_device(operation->request, [&](DeviceApi& device) {
      return device.time_of(operation->end.get()) - device.time_of(operation->begin.get());
    });
  }
  const PlainTensors plain;
  const Tensors all_keys = ranks.control().all_gather(keys).take();
  const Tensors all_seconds = ranks.control().all_gather(seconds).take();
  std::map<OperationKey, double> shortest;
  for (std::size_t rank = 0; rank < all_keys.size(); ++rank)
    for (std::int64_t i = 0; i < all_seconds[rank].numel(); ++i) {
      OperationKey key;
      std::copy_n(all_keys[rank].const_data_ptr<std::int64_t>() + i * columns, columns, key.begin());
      const double took = all_seconds[rank].const_data_ptr<double>()[i];
      const auto [found, added] = shortest.try_emplace(key, took);
      if (!added) found->second = std::min(found->second, took);
    }
  for (std::size_t i = 0; i < own.size(); ++i) operations[i]->shortest = shortest.at(own[i]);
}

}  // namespace dualpipe::detail
