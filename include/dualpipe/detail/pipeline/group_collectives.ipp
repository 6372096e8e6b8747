#pragma once

#include "dualpipe/pipeline/group_collectives.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <any>
#include <numeric>
#include <optional>
#include <utility>

#include "dualpipe/detail/pipeline/moved_rows.hpp"

namespace dualpipe {
namespace detail {

class GroupCollective : public Collective, public std::enable_shared_from_this<GroupCollective> {
 public:
  explicit GroupCollective(std::shared_ptr<Communicator> group, const char* name)
      : group_(std::move(group)), name_(name) {
    DUALPIPE_CHECK(group_ != nullptr, name_, " needs the communicator of a group, got null");
  }

  Pending backward(std::shared_ptr<void> handle, Tensors output_gradients) final {
    auto kept = std::static_pointer_cast<MovedTensors>(std::move(handle));
    std::vector<Pending> parts;
    std::vector<std::size_t> places;
    const std::size_t count = output_gradients.size();
    for (std::size_t i = 0; i < kept->size(); ++i) {
      if (!(*kept)[i].differentiable) continue;
      parts.push_back(launch_backward((*kept)[i], std::move(output_gradients[i])));
      places.push_back(i);
    }
    return join(std::move(parts), [this, self = shared_from_this(), kept = std::move(kept), places = std::move(places),
                                   count](std::vector<Tensors> results) {
      Tensors gradients(count);
      for (std::size_t k = 0; k < places.size(); ++k)
        gradients[places[k]] = finish_backward((*kept)[places[k]], std::move(results[k]));
      return gradients;
    });
  }

 protected:
  virtual Pending launch_backward(const MovedTensor& kept, at::Tensor gradient) = 0;
  virtual at::Tensor finish_backward(const MovedTensor& kept, Tensors parts) = 0;

  Communicator& group() { return *group_; }
  std::size_t size() const { return group_->size(); }
  std::size_t me() const { return group_->rank(); }
  const char* name() const { return name_; }

 private:
  std::shared_ptr<Communicator> group_;
  const char* name_;
};

/// Splits, or their copy that is on its way to the host.
struct HostSplits {
  at::Tensor values;    // int64
  Pending copied = {};  // empty: they are there
};

class RowsAllToAll final : public GroupCollective {
 public:
  explicit RowsAllToAll(std::shared_ptr<Communicator> group) : GroupCollective(std::move(group), "all_to_all") {}

  std::any prepare(const Tensors& inputs) override {
    if (inputs.empty() || !inputs.back().defined() || inputs.back().is_cpu()) return {};
    return on_host(inputs.back());
  }

  Launched forward(Tensors inputs, const StageContext& context) override {
    DUALPIPE_CHECK(inputs.size() >= 2, "all_to_all moves tensors and, as the last of them, their splits; it is given ",
                   inputs.size());
    const at::Tensor splits = std::move(inputs.back());
    inputs.pop_back();
    const auto* const prepared = std::any_cast<HostSplits>(&context.prepared);
    const at::Tensor host = read(splits, prepared);
    const Rows given = rows_in(host[0].flatten()), sent = rows_in(host[0]);
    for (const std::int64_t rows : given)
      DUALPIPE_CHECK(rows >= 0, "all_to_all: splits are numbers of rows, got ", rows_text(given));
    std::optional<Rows> expected;
    if (host.size(0) == 2) expected = rows_in(host[1]);
    const bool kinds = host.dim() == 3;
    Pending counts;  // of each kind, from each rank
    if (kinds && !expected) {
      Tensors outgoing = host[0].unbind();
      const Signature signature(size(), {.dtype = at::kLong, .sizes = outgoing[0].sizes().vec()});
      counts = group().control().all_to_all(std::move(outgoing), signature);
    }

    auto kept = std::make_shared<MovedTensors>();
    std::vector<Pending> parts;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      check_rows(name(), i, inputs[i]);
      const std::int64_t rows = std::accumulate(sent.begin(), sent.end(), std::int64_t{0});
      DUALPIPE_CHECK(!inputs[i].defined() || inputs[i].size(0) == rows, "all_to_all: the splits ", rows_text(sent),
                     " add up to ", rows, " rows, but tensor ", i, " is ", tensor_text(inputs[i]));
      kept->push_back(moved_tensor(inputs[i]));
      kept->back().sent = sent;
      parts.push_back(group().all_to_all(cut_rows(inputs[i], sent)));
    }
    auto finish = [this, self = shared_from_this(), kept, expected, host,
                   counts = std::move(counts)](std::vector<Tensors> results) mutable {
      at::Tensor incoming = expected ? host[1] : at::Tensor();
      if (counts) incoming = at::stack(counts.take());
      std::optional<Rows> came;
      if (incoming.defined()) came = rows_in(incoming);
      Tensors outputs;
      for (std::size_t i = 0; i < results.size(); ++i) {
        check_rank_parts(name(), i, results[i], me());
        note_parts((*kept)[i], results[i]);
        if (results[i].front().defined()) {
          const Rows& rows = (*kept)[i].received;
          if (!came) came = rows;
          DUALPIPE_CHECK(*came == rows, "all_to_all: rank ", me(), " of the group ",
                         expected             ? "expects by its splits "
                         : incoming.defined() ? "got with the splits "
                                              : "got with the first tensor ",
                         rows_text(*came), " rows from the ranks of the group, but tensor ", i, " came with ",
                         rows_text(rows));
        }
        outputs.push_back(with_gradient_flag(concatenated_rows(results[i]), (*kept)[i]));
      }
      if (!incoming.defined()) incoming = at::tensor(came.value_or(Rows(size())));
      outputs.push_back(at::stack({incoming, host[0]}));
      return outputs;
    };
    Pending pending = join(std::move(parts), std::move(finish));
    return {std::move(pending), std::move(kept)};
  }

 private:
  HostSplits on_host(const at::Tensor& splits) {
    const at::NoGradGuard no_grad;
    const at::Tensor source = splits.detach().to(at::kLong).contiguous();
    if (source.is_cpu()) return {source};
    HostSplits host{
        at::empty(source.sizes(), at::device(at::kCPU).dtype(at::kLong).pinned_memory(source.device().is_cuda()))};
    host.values.copy_(source, /*non_blocking=*/true);
    host.copied = group().fence();
    return host;
  }

  /// On the CPU, int64: [1 or 2, size] or [1 or 2, size, kinds].
  at::Tensor read(const at::Tensor& splits, const HostSplits* prepared) {
    const auto columns = static_cast<std::int64_t>(size());
    const auto fits = [&] {
      if (splits.dim() < 2) return splits.dim() == 1 && splits.size(0) == columns;
      return splits.dim() <= 3 && splits.size(1) == columns &&
             (splits.size(0) == 2 || (splits.size(0) == 1 && splits.dim() == 3));
    };
    DUALPIPE_CHECK(splits.defined() && at::isIntegralType(splits.scalar_type(), false) && fits(),
                   "all_to_all: the last tensor moved must be integer splits of sizes [", columns, "] or [2, ", columns,
                   "], or of several kinds of rows [1, ", columns, ", kinds] or [2, ", columns,
                   ", kinds], one number for each rank of the group; got ", tensor_text(splits));
    HostSplits host = prepared != nullptr ? *prepared : on_host(splits);
    if (host.copied) host.copied.synchronize();
    return splits.dim() == 1 ? host.values.unsqueeze(0) : host.values;
  }

  /// By rank: what `splits` [size] or [size, kinds] add up to.
  static Rows rows_in(const at::Tensor& splits) {
    const at::Tensor sums = splits.dim() == 2 ? splits.sum(1) : splits.contiguous();
    const std::int64_t* values = sums.const_data_ptr<std::int64_t>();
    return Rows(values, values + sums.numel());
  }

  Pending launch_backward(const MovedTensor& kept, at::Tensor gradient) override {
    return group().all_to_all(gradient_rows(gradient, kept), kept.returned());
  }
  at::Tensor finish_backward(const MovedTensor& kept, Tensors parts) override { return returned_gradient(kept, parts); }
};

class RowsAllGather final : public GroupCollective {
 public:
  explicit RowsAllGather(std::shared_ptr<Communicator> group) : GroupCollective(std::move(group), "all_gather") {}

  Launched forward(Tensors inputs, const StageContext&) override {
    auto kept = std::make_shared<MovedTensors>();
    std::vector<Pending> parts;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      check_rows(name(), i, inputs[i]);
      kept->push_back(moved_tensor(inputs[i]));
      kept->back().sent = Rows(size(), inputs[i].defined() ? inputs[i].size(0) : 0);
      parts.push_back(group().all_gather(std::move(inputs[i])));
    }
    auto finish = [this, self = shared_from_this(), kept](std::vector<Tensors> results) {
      Tensors outputs;
      for (std::size_t i = 0; i < results.size(); ++i) {
        check_rank_parts(name(), i, results[i], me());
        note_parts((*kept)[i], results[i]);
        outputs.push_back(with_gradient_flag(concatenated_rows(results[i]), (*kept)[i]));
      }
      return outputs;
    };
    Pending pending = join(std::move(parts), std::move(finish));
    return {std::move(pending), std::move(kept)};
  }

 private:
  Pending launch_backward(const MovedTensor& kept, at::Tensor gradient) override {
    return group().all_to_all(gradient_rows(gradient, kept), kept.returned());
  }
  at::Tensor finish_backward(const MovedTensor& kept, Tensors parts) override {
    at::Tensor sum = summed_parts(std::move(parts));
    return kept.own_gradient ? sum : at::Tensor();
  }
};

class RowsReduceScatter final : public GroupCollective {
 public:
  explicit RowsReduceScatter(std::shared_ptr<Communicator> group)
      : GroupCollective(std::move(group), "reduce_scatter") {}

  Launched forward(Tensors inputs, const StageContext&) override {
    auto kept = std::make_shared<MovedTensors>();
    std::vector<Pending> parts;
    const auto ranks = static_cast<std::int64_t>(size());
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      check_rows(name(), i, inputs[i]);
      DUALPIPE_CHECK(!inputs[i].defined() || inputs[i].size(0) % ranks == 0, "reduce_scatter: tensor ", i, " is ",
                     tensor_text(inputs[i]), "; the ", ranks, " ranks of the group must divide its number of rows");
      kept->push_back(moved_tensor(inputs[i]));
      kept->back().sent = Rows(size(), inputs[i].defined() ? inputs[i].size(0) / ranks : 0);
      parts.push_back(group().all_to_all(cut_rows(inputs[i], kept->back().sent)));
    }
    auto finish = [this, self = shared_from_this(), kept](std::vector<Tensors> results) {
      Tensors outputs;
      for (std::size_t i = 0; i < results.size(); ++i) {
        check_rank_parts(name(), i, results[i], me());
        note_parts((*kept)[i], results[i]);
        const Rows& rows = (*kept)[i].received;
        DUALPIPE_CHECK(rows == Rows(size(), rows[me()]), "reduce_scatter: ranks of the group have different numbers of",
                       " rows of tensor ", i, ": parts of ", rows_text(rows));
        outputs.push_back(with_gradient_flag(summed_parts(std::move(results[i])), (*kept)[i]));
      }
      return outputs;
    };
    Pending pending = join(std::move(parts), std::move(finish));
    return {std::move(pending), std::move(kept)};
  }

 private:
  /// Every rank has seen which parts require grad, so all know whether any gradient comes back.
  Pending launch_backward(const MovedTensor& kept, at::Tensor gradient) override {
    const std::int64_t rows = kept.sent[me()];
    const auto& wanted = kept.wants_gradient;
    if (std::find(wanted.begin(), wanted.end(), true) == wanted.end())
      return group().all_gather({}, Signature(size(), {.defined = false, .sizes = {}}));
    if (!gradient.defined()) gradient = kept.zeros(rows);
    return group().all_gather(std::move(gradient), Signature(size(), kept.signature(rows)));
  }
  at::Tensor finish_backward(const MovedTensor& kept, Tensors parts) override { return returned_gradient(kept, parts); }
};

}  // namespace detail

std::shared_ptr<Collective> all_to_all(std::shared_ptr<Communicator> group) {
  return std::make_shared<detail::RowsAllToAll>(std::move(group));
}
std::shared_ptr<Collective> all_gather(std::shared_ptr<Communicator> group) {
  return std::make_shared<detail::RowsAllGather>(std::move(group));
}
std::shared_ptr<Collective> reduce_scatter(std::shared_ptr<Communicator> group) {
  return std::make_shared<detail::RowsReduceScatter>(std::move(group));
}

}  // namespace dualpipe
