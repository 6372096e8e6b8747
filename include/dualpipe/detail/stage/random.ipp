#pragma once

#include <ATen/Context.h>

#include <cstddef>
#include <mutex>

#include "dualpipe/detail/stage/layer_random.hpp"
#include "dualpipe/stage/random.hpp"

namespace dualpipe {
namespace detail {

/// The step of splitmix64: each bit of the input changes half of the bits of the result.
inline std::uint64_t mixed(std::uint64_t sum, std::uint64_t value) {
  sum = (sum ^ value) + 0x9E3779B97F4A7C15ull;
  sum = (sum ^ (sum >> 30)) * 0xBF58476D1CE4E5B9ull;
  sum = (sum ^ (sum >> 27)) * 0x94D049BB133111EBull;
  return sum ^ (sum >> 31);
}

/// FNV-1a.
inline std::uint64_t text_hash(std::string_view text) {
  std::uint64_t hash = 0xCBF29CE484222325ull;
  for (const char letter : text) hash = (hash ^ static_cast<unsigned char>(letter)) * 0x100000001B3ull;
  return hash;
}

enum class Draws : std::uint64_t { in_a_run = 1, first_weights = 2 };

inline std::uint64_t base_seed(std::uint64_t seed, std::string_view layer, Draws draws) {
  return mixed(mixed(mixed(0, seed), static_cast<std::uint64_t>(draws)), text_hash(layer));
}

std::vector<at::Generator> default_generators(at::Device device) {
  std::vector<at::Generator> generators{at::globalContext().defaultGenerator(at::kCPU)};
  if (!device.is_cpu()) generators.push_back(at::globalContext().defaultGenerator(device));
  return generators;
}

void set_seed(const std::vector<at::Generator>& generators, std::uint64_t seed) {
  for (at::Generator generator : generators) {
    const std::lock_guard lock(generator.mutex());
    generator.set_current_seed(seed);
  }
}

std::vector<at::Tensor> states_of(const std::vector<at::Generator>& generators) {
  std::vector<at::Tensor> states;
  for (at::Generator generator : generators) {
    const std::lock_guard lock(generator.mutex());
    states.push_back(generator.get_state());
  }
  return states;
}

void set_states(const std::vector<at::Generator>& generators, const std::vector<at::Tensor>& states) {
  for (std::size_t i = 0; i < generators.size(); ++i) {
    at::Generator generator = generators[i];
    const std::lock_guard lock(generator.mutex());
    generator.set_state(states[i]);
  }
}

LayerRandom::LayerRandom(const std::optional<RandomKey>& key, const at::Generator& generator) {
  if (!key) return;
  key_ = *key;
  const at::Device device = generator.defined() ? generator.device() : at::Device(at::kCPU);
  generators_ = default_generators(device);
  restores_ = !generator.defined() || generator == generators_.back();
  if (!restores_) generators_ = {generator};
}

void LayerRandom::begin(const std::string& layer) { set_seed(generators_, layer_seed(key_, layer)); }

void LayerRandom::pause(const std::string& layer) { paused_[layer] = states_of(generators_); }

void LayerRandom::go_on(const std::string& layer) { set_states(generators_, paused_.at(layer)); }

}  // namespace detail

std::uint64_t layer_seed(const RandomKey& key, std::string_view layer) {
  std::uint64_t sum = detail::base_seed(key.seed, layer, detail::Draws::in_a_run);
  for (const std::int64_t number : {key.step, key.micro_batch, key.call})
    sum = detail::mixed(sum, static_cast<std::uint64_t>(number));
  return sum;
}

std::uint64_t weights_seed(std::uint64_t seed, std::string_view layer) {
  return detail::base_seed(seed, layer, detail::Draws::first_weights);
}

SeededDefaults::SeededDefaults(std::uint64_t seed, at::Device device) : kept_(detail::default_generators(device)) {
  detail::set_seed(kept_.generators(), seed);
}

}  // namespace dualpipe
