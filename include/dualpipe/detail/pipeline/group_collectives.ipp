#pragma once

#include "dualpipe/pipeline/group_collectives.hpp"

#include <ATen/ATen.h>

#include <algorithm>
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

class RowsAllToAll final : public GroupCollective {
 public:
  explicit RowsAllToAll(std::shared_ptr<Communicator> group) : GroupCollective(std::move(group), "all_to_all") {}

  Launched forward(Tensors inputs, const StageContext&) override {
    DUALPIPE_CHECK(inputs.size() >= 2, "all_to_all moves tensors and, as the last of them, their splits; it is given ",
                   inputs.size());
    const at::Tensor splits = std::move(inputs.back());
    inputs.pop_back();
    const auto [sent, expected] = read(splits);

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
    auto finish = [this, self = shared_from_this(), kept, expected = expected, sent = sent,
                   device = splits.device()](std::vector<Tensors> results) {
      std::optional<Rows> came = expected;
      Tensors outputs;
      for (std::size_t i = 0; i < results.size(); ++i) {
        check_rank_parts(name(), i, results[i], me());
        note_parts((*kept)[i], results[i]);
        if (results[i].front().defined()) {
          const Rows& rows = (*kept)[i].received;
          if (!came) came = rows;
          DUALPIPE_CHECK(*came == rows, "all_to_all: rank ", me(), " of the group ",
                         expected ? "expects by its splits " : "got with the first tensor ", rows_text(*came),
                         " rows from the ranks of the group, but tensor ", i, " came with ", rows_text(rows));
        }
        outputs.push_back(with_gradient_flag(concatenated_rows(results[i]), (*kept)[i]));
      }
      outputs.push_back(at::stack({at::tensor(came.value_or(Rows(size()))), at::tensor(sent)}).to(device));
      return outputs;
    };
    Pending pending = join(std::move(parts), std::move(finish));
    return {std::move(pending), std::move(kept)};
  }

 private:
  /// Rows to each rank, and from each where they are known.
  std::pair<Rows, std::optional<Rows>> read(const at::Tensor& splits) const {
    const auto columns = static_cast<std::int64_t>(size());
    DUALPIPE_CHECK(splits.defined() && at::isIntegralType(splits.scalar_type(), false) &&
                       (splits.sizes() == at::IntArrayRef{columns} || splits.sizes() == at::IntArrayRef{2, columns}),
                   "all_to_all: the last tensor moved must be integer splits of sizes [", columns, "] or [2, ", columns,
                   "], one number for each rank of the group; got ", tensor_text(splits));
    const at::Tensor host = splits.detach().to(at::kCPU, at::kLong).contiguous();
    const std::int64_t* values = host.const_data_ptr<std::int64_t>();
    const Rows sent(values, values + columns);
    for (const std::int64_t rows : sent)
      DUALPIPE_CHECK(rows >= 0, "all_to_all: splits are numbers of rows, got ", rows_text(sent));
    if (host.dim() == 1) return {sent, std::nullopt};
    return {sent, Rows(values + columns, values + 2 * columns)};
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
