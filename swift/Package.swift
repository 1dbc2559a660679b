// swift-tools-version:5.9
// Runners of bundles on ExecuTorch's Swift products, written to its documented API.
// Not yet run: no Apple device was at hand.

import PackageDescription

let package = Package(
  name: "BundleRunner",
  platforms: [.iOS(.v18), .macOS(.v15)],
  products: [
    .library(name: "BundleRunner", targets: ["BundleRunner"]),
    .executable(name: "bundle-runner", targets: ["bundle-runner"]),
  ],
  dependencies: [
    // The version that the exporter is tested with; ExecuTorch names its branches so.
    .package(url: "https://github.com/pytorch/executorch.git", branch: "swiftpm-1.5.1")
  ],
  targets: [
    .target(
      name: "BundleRunner",
      dependencies: [
        .product(name: "executorch", package: "executorch"),
        .product(name: "executorch_llm", package: "executorch"),
        .product(name: "backend_coreml", package: "executorch"),
        .product(name: "backend_xnnpack", package: "executorch"),
        .product(name: "kernels_optimized", package: "executorch"),
      ],
      linkerSettings: [
        // Backends and kernels register themselves as they are loaded, and nothing names them.
        .unsafeFlags(["-Wl,-all_load"])
      ]
    ),
    .executableTarget(name: "bundle-runner", dependencies: ["BundleRunner"]),
  ]
)
